"""Faults planted in real ranks: each ends the whole job soon, with its cause named."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from ranks import RankFailedError, run_ranks
from tiny import ADAM, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

LIMITS = {"hang_seconds": 4.0, "silent_seconds": 3.0}


def plan_in(folder: Path, dataset: dict, read_by: str = "all", **supervision):
    sections = {
        "model": {"vocab_size": 300},
        "data": {**dataset, "read_by": read_by},  # the fault comes with a sample
        "training": {"steps": 1000},
        "logging": {"directory": str(folder / "logs"), "interval": 1000},
        "supervision": {**LIMITS, **supervision},
    }
    return tiny_plan("llama", ADAM, tp=2, pp=2, sections=sections)


def train_with_fault(plan, fault: str, everywhere: bool = False) -> None:
    """Train; one rank (or each), the first if only that one reads, meets the fault while it reads its 12th sample."""
    from megagpt.data.samples import SampleStream
    from megagpt.parallel.launch import detect_launch
    from megagpt.signals import StopSignal
    from megagpt.train import run

    read, rank = SampleStream.sample, int(os.environ["RANK"])
    faulty = 1 if plan.run.data.read_by == "all" else 0
    faults = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "slow": lambda: time.sleep(60),
        "broken": lambda: 1 / 0,
        "memory": lambda: bytearray(1 << 60),
        "none": lambda: None,
    }

    def sample(self, index: int):
        if (rank == faulty or everywhere) and index == 12:
            faults[fault]()
        return read(self, index)

    SampleStream.sample = sample
    try:
        run(plan, detect_launch(), StopSignal())
    finally:
        print(f"left after {sys.exc_info()[0]}")


def report_of(plan, fault: str, seconds: float, everywhere: bool = False) -> tuple[str, str]:
    """What is reported, and the ranks' own errors; the job has ended within `seconds`."""
    started = time.monotonic()
    with pytest.raises(RankFailedError) as failure:
        run_ranks(train_with_fault, 4, plan, fault, everywhere, timeout=100)
    assert time.monotonic() - started < seconds
    (folder,) = (Path(plan.run.logging.directory) / "watchdog").iterdir()
    return (folder / "report.txt").read_text(), str(failure.value)


def stacks_in(folder: Path) -> dict[int, str]:
    """Stack by rank."""
    paths = (folder / "logs" / "watchdog").glob("*/stack-*.txt")
    return {int(path.stem.partition("-")[2]): path.read_text() for path in paths}


def test_a_killed_rank_ends_the_job_in_seconds(dataset, tmp_path) -> None:
    report, errors = report_of(plan_in(tmp_path, dataset, hang_seconds=600.0), "killed", 25)
    assert report.startswith("rank 1 on ")
    assert "is gone: its process" in report
    assert re.search(r"last seen in .* \(stage 0, step [12]", report)
    assert "rank 1: killed or timed out" in errors
    assert "Error: rank" not in errors, "the other ranks leave it at that"
    stacks = stacks_in(tmp_path)
    assert sorted(stacks) == [0, 2, 3]
    assert all("in train" in stack for stack in stacks.values())


def test_a_frozen_rank_is_named_with_its_state(dataset, tmp_path) -> None:
    report, _ = report_of(plan_in(tmp_path, dataset, hang_seconds=600.0), "frozen", 30)
    assert report.startswith("rank 1 on ")
    assert "does not run any more: its process" in report
    assert re.search(r"is stopped by a signal \(SIGSTOP\); it was last seen in .* \(stage 0, step [12]", report)
    stacks = stacks_in(tmp_path)
    assert sorted(stacks) == [0, 2, 3]
    assert all("main thread" in stack and "in train" in stack for stack in stacks.values())


def test_a_stuck_rank_is_found_through_who_waits_for_it(dataset, tmp_path) -> None:
    report, _ = report_of(plan_in(tmp_path, dataset), "slow", 40)
    assert report.startswith("no rank has made progress for ")
    assert "whose rank 1 on " in report
    assert "has stopped in the data loader at prefetch.py:" in report
    stacks = stacks_in(tmp_path)
    assert sorted(stacks) == [0, 1, 2, 3]
    assert "time.sleep(60)" in stacks[1]
    assert "train_step" in stacks[3]


def test_a_stuck_leader_is_told_from_those_that_wait_for_its_samples(dataset, tmp_path) -> None:
    report, _ = report_of(plan_in(tmp_path, dataset, read_by="leaders"), "slow", 40)
    assert re.search(r"rank [123] on .* waits for .* stage 0, whose rank 0 on ", report)
    assert "has stopped in the data loader at prefetch.py:" in report
    assert report.count("has stopped in") == 1, "the others only wait"


def test_an_error_of_one_rank_is_reported_once(dataset, tmp_path) -> None:
    report, errors = report_of(plan_in(tmp_path, dataset), "broken", 30)
    assert "rank 1 on " in report
    assert "ZeroDivisionError: division by zero" in report
    assert errors.count("ZeroDivisionError: division by zero") == 1


def test_lack_of_memory_shows_the_plan_and_what_would_fit(dataset, tmp_path) -> None:
    report, errors = report_of(plan_in(tmp_path, dataset), "memory", 30)
    for text in (report, errors):
        assert "out of memory in stage 0 of 2; its host has " in text
        assert "estimated memory per rank in MiB" in text
        assert "nearest change that is estimated to fit" in text


def test_ranks_that_lack_memory_together_show_the_plan_once(dataset, tmp_path) -> None:
    report, errors = report_of(plan_in(tmp_path, dataset), "memory", 30, everywhere=True)
    assert report.count("estimated memory per rank in MiB") == 1
    assert errors.count("estimated memory per rank in MiB") == 1
    assert errors.count("out of memory in stage 0 of 2") == 2, "the others have waited for their activations"


def test_nothing_is_left_of_a_run_that_ends_well(dataset, tmp_path) -> None:
    plan = plan_in(tmp_path, dataset)
    plan = tiny_plan(
        "llama", ADAM, dp=2, steps=2,
        sections={"data": dataset, "model": {"vocab_size": 300}, "logging": plan.run.logging.model_dump()},
    )  # fmt: skip
    run_ranks(train_with_fault, 2, plan, "none")
    assert not (tmp_path / "logs" / "watchdog").exists()
