"""A run does not start where another one goes on, and does where that one is dead."""

import os

import pytest
from ranks import run_ranks
from tiny import tiny_plan

from megagpt.supervise.beats import FOLDER, Beat, BeatFolder, Verdict, pid_space, process_start
from megagpt.supervise.other_start import living_start, wait_for_its_end
from megagpt.supervise.pulse import Phase


@pytest.fixture
def start(tmp_path):
    folder = BeatFolder(tmp_path / "20260101-000000-1")
    folder.create()
    return folder


def beat_of(host="here", *, number=1, phase=Phase.FORWARD, pid=None, rank=0):
    pid = os.getpid() if pid is None else pid
    return Beat(
        rank=rank,
        host=host,
        pid=pid,
        pid_started=process_start(os.getpid()),
        pid_space=pid_space() if host == "here" else "",
        stage=0,
        data=0,
        context=0,
        tensor=0,
        step=7,
        microbatch=None,
        phase=phase,
        count=1,
        number=number,
        still_for=0.0,
        is_stuck=False,
    )


def refuse_to_sleep(seconds):
    raise AssertionError("nothing is to be waited for")


def test_a_folder_without_starts_is_free(tmp_path):
    assert living_start(tmp_path / "watchdog", refuse_to_sleep) is None


def test_a_rank_of_this_host_is_there_or_not(start):
    start.write(beat_of())
    assert living_start(start.folder.parent, refuse_to_sleep).rank == 0
    start.write(beat_of(pid=1 << 30))
    assert living_start(start.folder.parent, refuse_to_sleep) is None


def test_a_rank_of_another_host_is_there_if_it_beats(start):
    for rank in range(2):
        start.write(beat_of("elsewhere", rank=rank))
    assert living_start(start.folder.parent, lambda seconds: None) is None
    living = living_start(start.folder.parent, lambda seconds: start.write(beat_of("elsewhere", rank=1, number=2)))
    assert (living.rank, living.step) == (1, 7)


def test_what_has_ended_is_not_waited_for(start):
    start.write(beat_of("elsewhere", phase=Phase.LEFT))
    assert living_start(start.folder.parent, refuse_to_sleep) is None
    start.write(beat_of("elsewhere"))
    os.utime(start.folder / "rank-00000.json", (1.0, 1.0))
    assert living_start(start.folder.parent, refuse_to_sleep) is None
    start.write(beat_of("elsewhere"))
    start.pass_verdict(Verdict(kind="lost", by=0, text="", culprits=[], hosts=[], exit_code=75))
    assert living_start(start.folder.parent, refuse_to_sleep) is None


def test_a_start_that_is_ending_is_given_time(start):
    start.write(beat_of())
    told = []
    assert wait_for_its_end(start.folder.parent, 0.0, told.append, lambda seconds: None) is not None
    assert wait_for_its_end(start.folder.parent, 9.0, told.append, lambda seconds: start.withdraw(0)) is None
    assert [beat.step for beat in told] == [7, 7]


def watch_beside_another(plan) -> str:
    """What comes of a start in the folder of a run that goes on."""
    from megagpt.errors import ConfigError
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks
    from megagpt.supervise.watch import watch

    try:
        with watch(plan, start_ranks(plan, detect_launch())):
            return "started"
    except ConfigError as error:
        return f"{error.exit_code}: {error}"


def test_no_rank_starts_beside_another_run(tmp_path, libraries):
    start = BeatFolder(tmp_path / FOLDER / "20260101-000000-1")
    start.create()
    start.write(beat_of())
    supervision = {"silent_seconds": 0.2}
    plan = tiny_plan(dp=2, sections={"logging": {"directory": str(tmp_path)}, "supervision": supervision})
    said = f"75: {tmp_path} is the folder of another run that goes on: its rank 0 on here (process {os.getpid()}) is at"
    for found in run_ranks(watch_beside_another, 2, plan):
        assert found.startswith(said)
    start.withdraw(0)
    assert run_ranks(watch_beside_another, 2, plan) == ["started", "started"]
