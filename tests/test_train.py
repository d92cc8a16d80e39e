"""The train loop from the command's point of view: what it prints, writes, survives and resumes."""

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from ranks import RankFailedError, run_ranks
from tiny import SGD
from trained import curve, plan_in, records, saved, train

from megagpt.plan.config import SupervisionConfig

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.fixture(scope="module")
def whole_run(dataset, tmp_path_factory):
    """A run on TP2 x PP2 to its end: folder and output of each rank."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = {"save_interval": 4, "asynchronous": False}  # or the order of lines would depend on the disk
    plan = plan_in(folder, dataset, tp=2, pp=2, training={"eval_interval": 3}, checkpoint=checkpoint)
    return folder, plan, run_ranks(train, 4, plan)


def test_metrics_have_one_record_per_step_and_evaluation(whole_run):
    folder, plan, _ = whole_run
    train_records = records(folder)
    assert [record["step"] for record in train_records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(folder, "validation")] == [0, 3, 6]
    assert [record["step"] for record in records(folder, "test")] == [6]
    assert train_records[0]["loss"] == pytest.approx(5.7, abs=0.1), "ln 300, as nothing is learnt yet"
    assert train_records[-1]["loss"] < train_records[0]["loss"] - 0.3
    assert [r["learning_rate"] for r in train_records] == [plan.run.optimizer.lr] * 6
    for record in records(folder, "validation"):
        assert record["loss"] == pytest.approx(train_records[max(record["step"] - 1, 0)]["loss"], abs=0.2)


def test_the_console_reads_well_and_only_rank_0_speaks(whole_run):
    folder, plan, outputs = whole_run
    assert [code for code, *_ in outputs] == [0] * 4
    assert [said + warned for _, said, warned in outputs[1:]] == [""] * 3
    assert outputs[0][2] == "", "no warnings"
    lines = outputs[0][1].splitlines()
    assert lines[0] == (
        f"{plan.num_parameters:,} parameters, fp32, TP 2 x PP 2 x DP 1, ZeRO 1, started by torchrun or deepspeed"
    )
    assert lines[1] == "6 steps of 8 x 32 = 256 tokens"
    assert [line.split("  ")[0] for line in lines[2:]] == [f"step {step}/6" for step in (0, 3, 3, 4, 4, 6, 6, 6, 6)]
    validation, test = records(folder, "validation"), records(folder, "test")
    assert (
        lines[2]
        == f"step 0/6  validation loss {validation[0]['loss']:.4f}  perplexity {validation[0]['perplexity']:.2f}"
    )
    assert f"test loss {test[0]['loss']:.4f}" in lines[9]
    assert lines[3].startswith(f"step 3/6  loss {records(folder)[2]['loss']:.4f}  lr 1.00e-03  grad norm ")
    assert lines[3].endswith(" left")
    assert "tokens/s" in lines[3]
    assert f"saved {folder}/checkpoints/step-00000004 in " in lines[6]
    assert lines[6].endswith(" s")
    assert ", for which training stood still " in lines[6]


def test_tensorboard_holds_the_same_losses(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = whole_run
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    for split in ("train", "validation", "test"):
        shown = [(scalar.step, scalar.value) for scalar in events.Scalars(f"{split}/loss")]
        assert shown == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records(folder, split)]


def test_a_finished_run_started_again_does_nothing(whole_run):
    folder, plan, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    outputs = run_ranks(train, 4, plan)
    assert [code for code, *_ in outputs] == [0] * 4
    assert outputs[0][1] == (
        f"{folder}/checkpoints already holds step 6 and training.steps=6: the run is finished, nothing to do; "
        "to go on, raise training.steps\n"
    )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_layout_does_not_change_the_curve(whole_run, dataset, tmp_path):
    folder, _, _ = whole_run
    plan = plan_in(tmp_path, dataset, training={"eval_interval": 3}, checkpoint={"save_interval": 4})
    run_ranks(train, 1, plan)
    for split in ("train", "validation", "test"):
        expected = [record["loss"] for record in records(folder, split)]
        assert [record["loss"] for record in records(tmp_path, split)] == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The curve of 6 steps with dropout in bf16 on TP2 x PP2."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train, 4, noisy_plan(folder, dataset))
    return curve(folder)


def noisy_plan(folder, dataset, **training):
    # logging.interval (4) and save_interval (3) differ: records up to a checkpoint must be there all the same
    checkpoint = {"save_interval": 3, "asynchronous": False}  # or a kill might come before the save is complete
    return plan_in(folder, dataset, tp=2, pp=2, precision="bf16", dropout=0.1, checkpoint=checkpoint, training=training)


def kill_rank_2(step: int) -> None:
    if step == 5 and os.environ["RANK"] == "2":
        os.kill(os.getpid(), signal.SIGKILL)


def kill_before_the_rename(plan) -> None:
    import megagpt.checkpoint.retention as module

    def die(source, target):
        assert Path(source).name == ".step-00000003.tmp"
        os.kill(os.getpid(), signal.SIGKILL)

    module.os.rename = die
    train(plan)


def test_a_killed_run_resumes_to_the_very_same_curve(undisturbed, dataset, tmp_path):
    plan = noisy_plan(tmp_path, dataset)
    with pytest.raises(RankFailedError, match="rank 2: killed"):
        run_ranks(train, 4, plan, kill_rank_2)
    assert saved(tmp_path) == ["step-00000003"]
    assert [record["step"] for record in records(tmp_path)][:3] == [1, 2, 3]
    outputs = run_ranks(train, 4, plan)
    assert f"resumed from {tmp_path}/checkpoints/step-00000003 (step 3)\n" in outputs[0][1]
    assert curve(tmp_path) == undisturbed


def test_a_run_killed_while_it_saves_resumes_to_the_very_same_curve(undisturbed, dataset, tmp_path):
    plan = noisy_plan(tmp_path, dataset)
    with pytest.raises(RankFailedError, match="rank 0: killed"):
        run_ranks(kill_before_the_rename, 4, plan)
    assert saved(tmp_path) == [".step-00000003.tmp"], "all is written, but not yet a checkpoint"
    outputs = run_ranks(train, 4, plan)
    assert "resumed" not in outputs[0][1]
    assert curve(tmp_path) == undisturbed
    assert saved(tmp_path) == ["step-00000003", "step-00000006"]


def signal_rank_3(step: int) -> None:
    if step == 2 and os.environ["RANK"] == "3":
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_rank_lets_all_save_and_stop(undisturbed, dataset, tmp_path):
    plan = noisy_plan(tmp_path, dataset)
    outputs = run_ranks(train, 4, plan, signal_rank_3)
    assert [code for code, *_ in outputs] == [0] * 4
    assert outputs[0][1].splitlines()[-1] == "step 3/6  stopped by a signal; the same command goes on from here"
    assert saved(tmp_path) == ["step-00000003"]
    run_ranks(train, 4, plan)
    assert curve(tmp_path) == undisturbed


def test_an_evaluation_that_is_due_when_the_run_is_stopped_is_made_once_it_goes_on(undisturbed, dataset, tmp_path):
    plan = noisy_plan(tmp_path, dataset, eval_interval=3)
    run_ranks(train, 4, plan, signal_rank_3)
    assert saved(tmp_path) == ["step-00000003"]
    assert [record["step"] for record in records(tmp_path, "validation")] == [0]
    run_ranks(train, 4, plan)
    assert [record["step"] for record in records(tmp_path, "validation")] == [0, 3, 6]
    assert curve(tmp_path) == undisturbed


def test_an_evaluation_that_a_checkpoint_knows_is_not_made_again(dataset, tmp_path):
    checkpoint = {"save_interval": 3, "asynchronous": False}
    for steps in (3, 4):
        plan = plan_in(tmp_path, dataset, steps=steps, training={"eval_interval": 3}, checkpoint=checkpoint)
        run_ranks(train, 1, plan)
    assert [record["step"] for record in records(tmp_path, "validation")] == [0, 3, 4]


def test_a_stopped_run_without_checkpoints_says_so(dataset, tmp_path):
    plan = plan_in(tmp_path, dataset, checkpoint={"directory": None})
    ((code, said, warned),) = run_ranks(train, 1, plan, lambda step: os.kill(os.getpid(), signal.SIGUSR1))
    assert code == 0
    assert said.splitlines()[-1] == (
        "step 1/6  stopped by a signal; nothing was saved, as checkpoint.directory is not set"
    )
    assert warned == "warning: checkpoint.directory is not set: nothing will be saved\n"
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_stops_in_time_before_its_limit(dataset, tmp_path, ranks):
    layout = dict(tp=2, pp=2) if ranks == 4 else {}
    plan = plan_in(tmp_path, dataset, steps=10_000, **layout)
    supervision = SupervisionConfig(stop_after_minutes=10.0)
    plan = dataclasses.replace(plan, run=plan.run.model_copy(update={"supervision": supervision}))
    outputs = run_ranks(train_as_if_started_long_ago, ranks, plan)
    assert [code for code, *_ in outputs] == [0] * ranks
    last = outputs[0][1].splitlines()[-1]
    assert last.endswith("/10,000  stopped before the time limit; the same command goes on from here")
    steps = int(last.split()[1].split("/")[0].replace(",", ""))
    assert saved(tmp_path) == [f"step-{steps:08d}"]


def test_how_long_a_save_took_is_known_after_a_resume(dataset, tmp_path):
    plan = plan_in(tmp_path, dataset, steps=1)
    run_ranks(train, 1, plan)
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    assert 0 < manifest["save_seconds"] < 60
    supervision = SupervisionConfig(stop_after_minutes=10.0)
    plan = plan_in(tmp_path, dataset, steps=4)
    plan = dataclasses.replace(plan, run=plan.run.model_copy(update={"supervision": supervision}))
    ((_, said, _),) = run_ranks(train_as_if_started_long_ago, 1, plan, 600 - 60)
    assert "stopped" not in said, "60 s are enough for a save that took no second"


def train_as_if_started_long_ago(plan, seconds_ago: float = 600 - 78) -> tuple[int, str, str]:
    """The limit is 78 s from when the run asks for it, of which a first save is taken for 75."""
    import psutil

    psutil.Process.create_time = lambda self: time.time() - seconds_ago
    return train(plan)


def test_a_diverged_run_stops_and_keeps_its_good_checkpoints(dataset, tmp_path):
    plan = plan_in(tmp_path, dataset, checkpoint={"save_interval": 1}, optimizer=dict(SGD, lr=1e20, min_lr=0.0))
    with pytest.raises(
        RankFailedError, match=r"TrainingError: step 2: loss nan.*diverged.*lower optimizer.lr \(now 1e\+20\)"
    ):
        run_ranks(train, 1, plan)
    assert saved(tmp_path) == ["step-00000001"]
    assert [(r["step"], r["loss"]) for r in records(tmp_path)][1:] == [(step, None) for step in (2, 3, 4)], (
        "JSON has no nan"
    )


def test_a_token_outside_the_vocabulary_is_told_by_the_rank_that_met_it(dataset, tmp_path):
    from megagpt.data.samples import SampleStream
    from megagpt.errors import DataError

    def train_with_a_bad_sample() -> None:
        read = SampleStream.sample

        def sample(self, index):
            if index == 11:  # the second step's second micro-batch, so data-parallel rank 1's
                raise DataError("data: token number 7 is 999")
            return read(self, index)

        SampleStream.sample = sample
        train(plan_in(tmp_path, dataset, dp=2))

    with pytest.raises(RankFailedError) as failure:
        run_ranks(train_with_a_bad_sample, 2)
    assert re.search("RankError: rank 1 on .*: data: token number 7 is 999", str(failure.value))
    assert "RankError: rank 0" not in str(failure.value), "said once, by the rank that met it"
    assert "rank 0: " in str(failure.value)
    (report,) = (tmp_path / "logs" / "watchdog").glob("*/report.txt")
    assert re.fullmatch("rank 1 on .*: data: token number 7 is 999\n", report.read_text())


def test_odd_splits_and_batches_run_through(dataset, tmp_path):
    # no validation text at all; samples shorter than the model's context
    plan = plan_in(
        tmp_path,
        dataset,
        pp=2,
        dp=2,
        steps=2,
        data={"split": [1, 0, 0]},
        training={"eval_interval": 1, "seq_length": 20},
    )
    outputs = run_ranks(train, 4, plan)
    assert "there will be no validation" in outputs[0][2]
    assert "validation" not in outputs[0][1]
    assert saved(tmp_path) == ["step-00000002"]

    short = tmp_path / "short"
    plan = plan_in(short, dataset, steps=1, data={"split": [98, 1, 1]}, training={"eval_interval": 1})
    run_ranks(train, 1, plan)
    assert [record["step"] for record in records(short, "validation")] == [0, 1], "a short split is repeated"


def test_an_earlier_runs_records_are_kept_apart(dataset, tmp_path):
    for _ in range(2):
        plan = plan_in(tmp_path, dataset, steps=1, training={"eval_interval": 1}, checkpoint={"directory": None})
        run_ranks(train, 1, plan)
    assert [record["step"] for record in records(tmp_path, "validation")] == [0, 1]
    previous = (tmp_path / "logs" / "metrics.previous.jsonl").read_text().splitlines()
    assert len(previous) == 4


def test_a_lower_number_of_steps_than_saved_is_a_finished_run(whole_run, dataset):
    folder, _, _ = whole_run
    ((code, said, _),) = run_ranks(train, 1, plan_in(folder, dataset, steps=2))
    assert code == 0
    assert "already holds step 6 and training.steps=2" in said
