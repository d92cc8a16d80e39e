"""Runs that meet bad numbers: what is transient leaves no trace, what stays is skipped, and the run goes on."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from ranks import RankFailedError, run_ranks
from tiny import ADAM, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

STEPS = 8


def plan_in(folder: Path, dataset: dict, *, save_interval: int = 2, dropout: float = 0.1, supervision=None, **layout):
    sections = {
        "model": {"vocab_size": 300},
        "data": dataset,
        "training": {"eval_batches": 1},
        "checkpoint": {"directory": str(folder / "checkpoints"), "save_interval": save_interval},
        "logging": {"directory": str(folder / "logs"), "interval": 2},
        "supervision": supervision or {},
    }
    return tiny_plan("llama", ADAM, steps=STEPS, dropout=dropout, sections=sections, **{"tp": 2, "dp": 2, **layout})


def train_with(plan, fault: str, steps: tuple[int, ...], stop_at: int = 0) -> str:
    """Train; rank 1 meets a fault at calls of the engine's step, counted from 1, and is told to stop in one of them;
    what rank 0 says."""
    import contextlib
    import io

    import torch

    from megagpt.engine import Engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.signals import StopSignal
    from megagpt.train import run

    take, calls, hooked = Engine.train_step, iter(range(1, 1000)), []

    def train_step(self, *args, **kwargs):
        call, is_rank_1 = next(calls), os.environ["RANK"] == "1"
        now = call in steps and is_rank_1
        if call == stop_at and is_rank_1:
            os.kill(os.getpid(), signal.SIGTERM)
        parameter = next(iter(self.parameters.values()))
        if fault == "gradient" and not hooked:
            hooked.append(parameter.register_hook(lambda grad: grad * float("nan") if hooked[-1] is True else grad))
        if fault == "gradient":
            hooked[1:] = [now]
        if fault == "drift" and now:
            for value in self.parameters.values():
                value.data.mul_(1.25)
        if fault == "flip" and now:
            parameter.data.view(torch.int32).flatten()[0] ^= 1 << 20
        return take(self, *args, **kwargs)

    Engine.train_step = train_step
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(plan, detect_launch(), StopSignal())
    return said.getvalue()


def curve(folder: Path) -> list[tuple]:
    records = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["split"] == "train"]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train_with, 4, plan_in(folder, dataset), "", ())
    return curve(folder)


def test_a_passing_fault_leaves_no_trace(undisturbed, dataset, tmp_path) -> None:
    said, *_ = run_ranks(train_with, 4, plan_in(tmp_path, dataset), "gradient", (3,))
    assert curve(tmp_path) == undisturbed
    (line,) = [line for line in said.splitlines() if "computed again" in line]
    assert line.startswith("step 3: loss ")
    assert line.endswith("the run goes on undisturbed: a device or a transfer has erred")
    assert not (tmp_path / "logs" / "skipped.jsonl").exists()


def test_a_bad_batch_is_skipped_and_written_down(undisturbed, dataset, tmp_path) -> None:
    said, *_ = run_ranks(train_with, 4, plan_in(tmp_path, dataset, save_interval=3), "gradient", (3, 4))
    assert "no weight was updated; samples 16 ... 23 are skipped (1 in a row, 1 in all)" in said
    assert curve(tmp_path)[:2] == undisturbed[:2]
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, STEPS + 1))
    (skipped,) = map(json.loads, (tmp_path / "logs" / "skipped.jsonl").read_text().splitlines())
    assert (skipped["step"], skipped["samples"]) == (3, [16, 24])
    steps = re.findall(r"saved .*/step-0+(\d+) in", said)
    assert steps == ["4", "6", "8"], "not step 3, whose weights were in doubt, but the next one"


def test_a_run_that_is_stopped_at_a_bad_step_saves_after_the_next_one(dataset, tmp_path) -> None:
    plan = plan_in(tmp_path, dataset)
    said, *_ = run_ranks(train_with, 4, plan, "gradient", (3, 4), 2)
    assert said.splitlines()[-1] == "step 4/8  stopped by a signal; the same command goes on from here"
    assert saved(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_run_that_is_stopped_among_bad_steps_says_where_it_goes_on(dataset, tmp_path) -> None:
    plan = plan_in(tmp_path, dataset)
    said, *_ = run_ranks(train_with, 4, plan, "gradient", (3, 4, 5, 6), 2)
    assert said.splitlines()[-1] == (
        "step 4/8  stopped by a signal; the last steps were bad, so nothing was saved; the same command goes on from "
        "step 2"
    )
    assert saved(tmp_path) == ["step-00000002"]


def test_after_some_in_a_row_the_run_goes_back_and_skips_their_samples(dataset, tmp_path) -> None:
    plan = plan_in(tmp_path, dataset, supervision={"max_bad_steps": 2})
    # step 3 is good, steps 4 and 5 are bad, twice each
    said, *_ = run_ranks(train_with, 4, plan, "gradient", (4, 5, 6, 7))
    assert "step 5: 2 bad steps in a row; the run goes back to step 2, and samples 16 ... 39 are skipped" in said
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, STEPS + 1))
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert (manifest["step"], manifest["samples"], manifest["updates"]) == (8, 16 + 24 + 6 * 8, 8)


def test_a_run_that_stays_bad_is_given_up(dataset, tmp_path) -> None:
    plan = plan_in(tmp_path, dataset, supervision={"max_bad_steps": 1})
    with pytest.raises(RankFailedError) as failure:
        run_ranks(train_with, 4, plan, "gradient", tuple(range(3, 100)))
    assert "TrainingError: step 3: loss " in str(failure.value)
    assert "so it was after 2 returns to the checkpoint of step 2" in str(failure.value)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_a_flipped_bit_in_one_copy_ends_the_run_before_it_spreads(undisturbed, dataset, tmp_path) -> None:
    plan = plan_in(tmp_path, dataset, supervision={"replica_check_interval": 2})
    with pytest.raises(RankFailedError) as failure:
        run_ranks(train_with, 4, plan, "flip", (4,))
    words = "UnreliableError: the weights of rank 1 on .*, rank 3 on .* differ from those of their data-parallel copies"
    assert re.search(rf"{words} \(embedding.word_embeddings.weight\)", str(failure.value)), "two copies: no majority"
    (verdict,) = (json.loads(path.read_text()) for path in tmp_path.rglob("verdict.json"))
    assert (verdict["kind"], verdict["culprits"]) == ("unreliable", [1, 3])
    run_ranks(train_with, 4, plan, "", ())
    assert curve(tmp_path) == undisturbed


def test_a_step_that_comes_out_otherwise_the_second_time_ends_the_run(dataset, tmp_path) -> None:
    plan = plan_in(tmp_path, dataset, supervision={"recompute_interval": 3})
    run_ranks(train_with, 4, plan, "", ())
    folder = tmp_path / "again"
    plan = plan_in(folder, dataset, supervision={"recompute_interval": 3})
    with pytest.raises(RankFailedError, match="UnreliableError: step 3: computed twice from the same samples"):
        run_ranks(train_with, 4, plan, "drift", (4,))
    assert len(curve(tmp_path)) == STEPS
