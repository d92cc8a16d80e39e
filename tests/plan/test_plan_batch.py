"""Batch sizes are completed as DeepSpeed completes them, and must multiply out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import ConfigError
from megagpt.plan import deepspeed_config_from_dict
from megagpt.plan.batch import Batch, resolve_batch

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def resolve(total, micro, accumulation, ranks):
    sizes = dict(zip(KEYS, (total, micro, accumulation), strict=True))
    raw = {key: size for key, size in sizes.items() if size is not None}
    return resolve_batch(deepspeed_config_from_dict(raw, source="ds.json"), ranks)


@pytest.mark.parametrize(
    ("given_sizes", "ranks", "expected"),
    [
        ((64, 4, 2), 8, Batch(4, 2, 64)),
        ((64, 4, None), 8, Batch(4, 2, 64)),
        ((64, None, 2), 8, Batch(4, 2, 64)),
        ((None, 4, 2), 8, Batch(4, 2, 64)),
        ((64, None, None), 8, Batch(8, 1, 64)),
        ((None, 4, None), 8, Batch(4, 1, 32)),
    ],
)
def test_any_two_sizes_or_one(given_sizes, ranks, expected):
    assert resolve(*given_sizes, ranks) == expected


@pytest.mark.parametrize(
    ("given_sizes", "ranks", "words"),
    [
        ((None, None, None), 8, "neither train_batch_size nor train_micro_batch_size_per_gpu"),
        ((None, None, 4), 8, "neither train_batch_size nor train_micro_batch_size_per_gpu"),
        ((100, 4, None), 8, "train_micro_batch_size_per_gpu x data-parallel size = 4 x 8 = 32; use 96 or 128"),
        ((100, None, 4), 8, "gradient_accumulation_steps x data-parallel size = 4 x 8 = 32; use 96 or 128"),
        ((3, None, None), 8, "= 1 x 8 = 8; use 8"),
        (
            (64, 4, 3),
            8,
            "4 x 3 x 8 = 96; use train_batch_size=96 or gradient_accumulation_steps=2, or remove one of the three",
        ),
    ],
)
def test_errors_name_sizes_that_multiply_out(given_sizes, ranks, words):
    with pytest.raises(ConfigError) as caught:
        resolve(*given_sizes, ranks)
    assert words in str(caught.value)
    assert str(caught.value).startswith("ds.json: ")


@given(micro=st.integers(1, 64), accumulation=st.integers(1, 64), ranks=st.integers(1, 64), hidden=st.integers(0, 3))
def test_leaving_one_out_changes_nothing(micro, accumulation, ranks, hidden):
    sizes = [micro * accumulation * ranks, micro, accumulation]
    if hidden < 3:
        sizes[hidden] = None
    assert resolve(*sizes, ranks) == Batch(micro, accumulation, micro * accumulation * ranks)
