"""What the meter prints and writes."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pty
import re
import sys

import pytest
import torch
from tiny import tiny_plan

from megagpt.errors import TrainingError
from megagpt.metrics import Meter, perplexity
from megagpt.parallel.console import Console


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "logs"


def meter_in(folder, first_step: int = 0, rank: int = 0, **options) -> Meter:
    sections = {"logging": {"directory": str(folder)}}
    return Meter(tiny_plan(steps=2000, sections=sections, **options), Console(rank), first_step)


def record(meter: Meter, *steps: int, loss: float = 2.0, norm: float = 0.5) -> None:
    for step in steps:
        meter.record(step, 1e-3, torch.tensor(loss + step), torch.tensor(norm))


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_record_per_step_and_speed_once_per_report(folder, capsys):
    with contextlib.closing(meter_in(folder)) as meter:
        record(meter, 1, 2, 3)
        assert lines(folder) == [], "nothing is fetched before the report"
        meter.report()
        meter.report()  # nothing new: says nothing
    found = lines(folder)
    assert [r["step"] for r in found] == [1, 2, 3]
    assert [r["loss"] for r in found] == [3.0, 4.0, 5.0]
    assert [("tokens_per_second" in r, "memory_gb" in r) for r in found] == [(False,) * 2, (False,) * 2, (True,) * 2]
    assert meter.latest == {"train_loss": 5.0}
    said = capsys.readouterr().out
    assert said.startswith("step     3/2,000  loss 5.0000  lr 1.00e-03  grad norm 0.500  ")
    assert said.count("\n") == 1


def test_only_rank_0_writes(folder, capsys):
    with contextlib.closing(meter_in(folder, rank=1)) as meter:
        record(meter, 1)
        meter.report()
        meter.report_eval("validation", 1.0, 1)
    assert not folder.exists()
    assert capsys.readouterr().out == ""
    assert meter.latest == {"train_loss": 3.0, "validation_loss": 1.0}


def test_pauses_do_not_count(folder, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("megagpt.metrics.time.monotonic", lambda: clock[0])
    with contextlib.closing(meter_in(folder)) as meter:
        tokens = meter.plan.tokens_per_step
        for step in range(1, 5):
            record(meter, step)
            clock[0] += 0.5
        clock[0] += 30.0
        meter.pause(30.0)
        meter.report()
        record(meter, 5)
        clock[0] += 1.0
        meter.report()
    speeds = [r["tokens_per_second"] for r in lines(folder) if "tokens_per_second" in r]
    assert speeds == pytest.approx([4 * tokens / 2.0, tokens / 1.0])


def test_a_resumed_run_drops_what_it_does_again(folder):
    with contextlib.closing(meter_in(folder)) as meter:
        meter.report_eval("validation", 2.0, 0)
        record(meter, 1, 2, 3, 4)
        meter.report()
        meter.report_eval("validation", 1.0, 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": null}\n{"step": 2, "sp')  # foreign lines, and one cut off by a kill
    with contextlib.closing(meter_in(folder, first_step=2)):
        assert [(r["step"], r["split"]) for r in lines(folder)] == [
            (0, "validation"),
            (1, "train"),
            (2, "train"),
            (2, "validation"),
        ]
    assert not (folder / "metrics.previous.jsonl").exists()


def test_a_fresh_run_keeps_the_records_of_the_one_before(folder):
    for loss in (1.0, 2.0):
        with contextlib.closing(meter_in(folder)) as meter:
            meter.report_eval("validation", loss, 0)
    assert [r["loss"] for r in lines(folder)] == [2.0]
    assert json.loads((folder / "metrics.previous.jsonl").read_text())["loss"] == 1.0


def test_tensorboard_hides_what_is_done_again(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, loss in ((0, 1.0), (2, 100.0)):
        with contextlib.closing(meter_in(folder, first_step)) as meter:
            record(meter, *range(first_step + 1, 5), loss=loss)
            meter.report()
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    assert shown == [(1, 2.0), (2, 3.0), (3, 103.0), (4, 104.0)]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_what_is_not_finite_ends_the_run_after_it_is_written(folder, loss, norm):
    with contextlib.closing(meter_in(folder)) as meter:
        record(meter, 1)
        record(meter, 2, loss=loss, norm=norm)
        record(meter, 3)
        with pytest.raises(TrainingError, match=r"step 2: loss .*diverged; use a lower optimizer\.lr \(now 0\.001\)"):
            meter.report()
    text = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert len(lines(folder)) == 3


def fp16_meter_in(folder, **fp16) -> Meter:
    return meter_in(folder, precision="fp16", deepspeed={"fp16": fp16})


def test_steps_that_fp16_skips_are_written_and_counted(folder, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loss = torch.tensor(3.0)
    with contextlib.closing(fp16_meter_in(folder)) as meter:
        meter.record(1, 1e-3, loss, math.inf, loss_scale=65536.0, skipped=True)
        meter.record(2, 1e-3, loss, 0.5, loss_scale=32768.0)
        meter.report()
        meter.record(3, 1e-3, loss, 0.5, loss_scale=32768.0)
        meter.report()
    first, second = capsys.readouterr().out.splitlines()
    assert "  loss scale 32,768 (1 skipped)  grad norm 0.500  " in first
    assert "  loss scale 32,768  grad norm 0.500  " in second
    assert [(r["loss_scale"], r["skipped"], r["grad_norm"]) for r in lines(folder)] == [
        (65536.0, 1, None),
        (32768.0, 0, 0.5),
        (32768.0, 0, 0.5),
    ]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [scalar.value for scalar in events.Scalars("train/loss_scale")] == [65536.0, 32768.0, 32768.0]
    assert [scalar.value for scalar in events.Scalars("train/skipped")] == [1.0, 0.0, 0.0]


def test_a_loss_that_is_no_number_ends_an_fp16_run_too(folder):
    with contextlib.closing(fp16_meter_in(folder)) as meter:
        meter.record(1, 1e-3, torch.tensor(math.nan), math.inf, loss_scale=1.0, skipped=True)
        meter.report()  # its update was skipped: the run may go on
        supervision = meter.plan.run.supervision.model_copy(update={"max_bad_steps": 0})
        run = meter.plan.run.model_copy(update={"supervision": supervision})
        meter.plan = dataclasses.replace(meter.plan, run=run)
        meter.record(2, 1e-3, torch.tensor(math.nan), math.inf, loss_scale=1.0, skipped=True)
        with pytest.raises(TrainingError, match=r"step 2: loss nan.*bf16 instead of fp16"):
            meter.report()


@pytest.mark.parametrize(("fp16", "key"), [({}, "fp16.initial_scale_power"), ({"loss_scale": 64}, "fp16.loss_scale")])
def test_an_fp16_run_that_only_overflows_ends(folder, fp16, key):
    def skip(first: int, last: int) -> None:
        for step in range(first, last + 1):
            meter.record(step, 1e-3, torch.tensor(3.0), math.inf, loss_scale=64.0, skipped=True)
        meter.report()

    with contextlib.closing(fp16_meter_in(folder, **fp16)) as meter:
        skip(1, 49)
        meter.record(50, 1e-3, torch.tensor(3.0), 0.5, loss_scale=64.0)
        skip(51, 99)
        with pytest.raises(TrainingError, match=rf"step 100: .*last 50 steps overflowed.*a smaller {re.escape(key)}"):
            skip(100, 101)


def test_a_held_out_loss_that_is_not_finite_never_reaches_a_checkpoint(folder):
    with contextlib.closing(meter_in(folder)) as meter:
        meter.report_eval("validation", 2.0, 0)
        with pytest.raises(TrainingError, match=r"step 3: the validation loss is nan.*lower optimizer\.lr"):
            meter.report_eval("validation", math.nan, 3)
        assert meter.latest == {"validation_loss": 2.0}


def test_perplexity():
    assert perplexity(math.log(300)) == pytest.approx(300)
    assert perplexity(1e6) < math.inf
    assert math.isnan(perplexity(math.nan))


def test_a_terminal_gets_a_bar_and_whole_lines(folder, monkeypatch):
    """On a terminal a bar moves below the lines; both come through the same pseudo-terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    leader, follower = pty.openpty()
    earlier, sys.stdout = sys.stdout, os.fdopen(follower, "w")
    try:
        with contextlib.closing(meter_in(folder)) as meter:
            record(meter, 1)
            meter.report()
            meter.report_eval("validation", 1.5, 1)
    finally:
        sys.stdout.close()
        sys.stdout = earlier
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert "1/2000" in shown
    assert "loss 3.0000  lr 1.00e-03  " in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown, "nothing is cut off at 80 columns"
    assert "validation loss 1.5000  perplexity 4.48\r\n" in shown


def test_lines_without_a_terminal_hold_no_control_characters(folder):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.closing(meter_in(folder)) as meter:
        record(meter, 1)
        meter.report()
    assert said.getvalue().replace("\n", "").isprintable()
