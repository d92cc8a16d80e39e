"""The scheduler's time limit, and how early a save is started."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny import tiny_plan

from megagpt.signals import StopSignal
from megagpt.supervise.deadline import FIRST_SAVE_SECONDS, LEAVING_SECONDS, Deadline, end_of_job
from megagpt.supervise.stopping import Stopping
from megagpt.train import evaluations_ahead


class OwnVotes:
    """A job of one rank."""

    def now(self, *votes: int) -> list[int]:
        return list(votes)

    vote = now


def test_the_end_of_a_job_comes_from_its_variables() -> None:
    assert end_of_job({}) is None
    assert end_of_job({"SLURM_JOB_END_TIME": "1700000000"}) is None, "left over from another job"
    assert end_of_job({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9


@pytest.mark.parametrize(("answer", "expected"), [("2026-01-02T03:04:05", True), ("N/A", False), ("", False)])
def test_an_older_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: bool) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\necho {answer}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    moment = time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    assert end_of_job({"SLURM_JOB_ID": "7"}) == (moment if expected else None)
    assert (tmp_path / "asked").read_text() == "--noheader --jobs 7 --format=%e\n"


def test_without_squeue_there_is_no_known_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        subprocess.run(["squeue"], check=True)
    assert end_of_job({"SLURM_JOB_ID": "7"}) is None


def test_the_save_starts_early_enough_for_what_was_measured() -> None:
    deadline = Deadline(ends_at=1000.0)
    assert deadline.seconds_needed() == FIRST_SAVE_SECONDS + LEAVING_SECONDS
    deadline.note_step(4.0)
    deadline.note_step(2.0)
    assert deadline.seconds_needed() == pytest.approx(2 * 3.6 + FIRST_SAVE_SECONDS + LEAVING_SECONDS)
    deadline.note_save(20.0)
    deadline.note_save(10.0)
    needed = 2 * 3.6 + 1.5 * 20.0 + LEAVING_SECONDS
    assert deadline.seconds_needed() == pytest.approx(needed), "the slowest save counts"
    assert not deadline.is_near(now=1000.0 - needed - 0.1)
    assert deadline.is_near(now=1000.0 - needed + 0.1)


def test_a_large_checkpoint_is_begun_earlier_until_its_save_is_measured() -> None:
    deadline = Deadline(time.time() + 36_000.0, bytes_per_rank=13_000_000_000)
    assert deadline.seconds_needed() == 260.0 + LEAVING_SECONDS
    deadline.note_save(400.0)
    assert deadline.seconds_needed() == 600.0 + LEAVING_SECONDS


def test_a_guessed_save_leaves_most_of_the_time_to_training() -> None:
    ends_at = time.time() + 1800.0
    assert Deadline(ends_at, bytes_per_rank=96_000_000_000).seconds_needed() == pytest.approx(450.0 + 15.0, abs=1.0)
    assert Deadline(ends_at, bytes_per_rank=None).seconds_needed() == LEAVING_SECONDS, "nothing will be saved"


def test_a_long_evaluation_is_remembered_until_the_next_one() -> None:
    deadline = Deadline(1000.0)
    deadline.note_evaluation(600.0)
    for _ in range(100):
        deadline.note_step(1.0)
    assert deadline.is_near(evaluations=1, now=330.0)
    assert not deadline.is_near(evaluations=0, now=330.0)


@pytest.mark.parametrize(("step", "ahead"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)])
def test_evaluations_are_counted_until_the_run_can_stop_again(step: int, ahead: int) -> None:
    plan = tiny_plan(steps=6, sections={"training": {"eval_interval": 3}})
    assert evaluations_ahead(plan, step) == ahead


def test_an_evaluation_is_no_part_of_a_step(stop_signal: StopSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stopping = Stopping(stop_signal, Deadline(None), OwnVotes())
    now[0] += 50.0
    stopping.note_evaluation(50.0)
    now[0] += 2.0
    stopping.after_step()
    assert stopping.deadline.seconds_needed(1) == 2 * 2.0 + 50.0 + FIRST_SAVE_SECONDS + LEAVING_SECONDS


def test_the_earlier_limit_counts_and_none_is_never_near() -> None:
    assert Deadline(200.0, 100.0).ends_at == 100.0
    assert Deadline(None, 100.0).ends_at == 100.0
    assert not Deadline(None).is_near(now=1e12)


@pytest.fixture
def stop_signal():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield StopSignal()
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_signal_and_a_near_limit_are_told_apart(stop_signal: StopSignal) -> None:
    assert Stopping(stop_signal, Deadline(None), OwnVotes()).before_the_first_step() is None
    late = Stopping(stop_signal, Deadline(time.time() + 1), OwnVotes())
    assert late.before_the_first_step() == "stopped before the time limit"
    signal.raise_signal(signal.SIGUSR1)
    assert late.after_step() == "stopped by a signal"
