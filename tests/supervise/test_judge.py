"""What is taken for a spike, and what is not."""

import random

import pytest

from megagpt.supervise.careful import Rewindable
from megagpt.supervise.judge import FEWEST, SpikeJudge


def judge_with_history(threshold: float = 10.0, noise: float = 0.02) -> SpikeJudge:
    judge, chooser = SpikeJudge(threshold), random.Random(0)
    for step in range(2 * FEWEST):
        assert judge(4.0 - 0.01 * step + chooser.gauss(0, noise), 1.0 + chooser.random()) is None
    return judge


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (3.0, float("nan"))])
def test_what_is_no_number_is_refused_from_the_first_step(loss: float, norm: float) -> None:
    assert SpikeJudge(0.0)(loss, norm) == f"loss {loss:.4g}, gradient norm {norm:.4g}"


def test_a_spike_needs_a_history_and_is_not_learnt_from() -> None:
    assert SpikeJudge(10.0)(1e9, 1.0) is None, "nothing is unusual at first"
    judge = judge_with_history()
    for _ in range(FEWEST):
        problem = judge(8.0, 1.5)
        assert problem is not None
        assert "loss 8 is a spike: the last 64 had a median of 3.6" in problem
    assert judge(3.4, 1.5) is None


def test_noise_is_no_spike() -> None:
    judge, chooser = judge_with_history(), random.Random(1)
    assert [judge(3.36 + chooser.gauss(0, 0.02), 1.0) for _ in range(300)] == [None] * 300
    assert judge_with_history(noise=1e-6)(3.7, 1.0) is None, "less than 10 % above the median, however quiet it was"


def test_a_threshold_of_0_compares_nothing() -> None:
    assert judge_with_history(threshold=0.0)(1e6, 1e9) is None


def test_a_norm_beyond_all_measure_is_a_spike() -> None:
    problem = judge_with_history()(3.4, 1e6)
    assert problem is not None
    assert problem.startswith("gradient norm 1e+06 is a spike")


def test_an_iterator_goes_back_to_its_mark_only() -> None:
    items = Rewindable(iter(range(10)))
    assert [next(items), next(items)] == [0, 1]
    items.mark()
    assert [next(items), next(items), next(items)] == [2, 3, 4]
    items.rewind()
    assert [next(items), next(items)] == [2, 3]
    items.mark()
    assert list(items) == [4, 5, 6, 7, 8, 9]
