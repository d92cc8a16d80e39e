"""Ranks around a table: some do not come, some fall silent."""

import os
import time
from dataclasses import replace

import pytest
import torch.distributed as dist
from ranks import run_ranks

from megagpt.errors import LaunchError
from megagpt.parallel.launch import detect_launch
from megagpt.preflight import examine
from megagpt.preflight.meeting import Meeting

pytestmark = pytest.mark.usefixtures("libraries")


def meet_in_a_larger_job(world_size: int) -> tuple[float, list[str]]:
    """Seconds that an examination takes, and its findings, where most ranks are missing."""
    launch = replace(detect_launch(), world_size=world_size, local_rank=0)
    begun = time.monotonic()
    findings = examine(None, launch, 4.0)  # type: ignore[arg-type]
    return time.monotonic() - begun, [finding.text for finding in findings]


def test_all_missing_ranks_are_waited_for_together_and_one_rank_tells() -> None:
    (seconds, (text,)), (_, others) = run_ranks(meet_in_a_larger_job, 2, 40)
    assert seconds < 20, "not 4 s for each"
    assert text.startswith("of 40 ranks 38 have not come to 127.0.0.1:")
    assert "within 4 s: 2, 3, 4, 5, 6, 7, 8, 9; see what their hosts print" in text
    assert not others


def gather_with_one_that_is_busy() -> tuple[dict, dict, dict] | str:
    meeting = Meeting(detect_launch(), 60.0)
    rank = meeting.launch.rank
    before = meeting.gather("value", 10 * rank, 60)
    meeting.note("its disk")
    if rank == 2:
        time.sleep(26)
        with pytest.raises(LaunchError) as raised:
            meeting.gather("value", 10 * rank + 1, 8)
        return str(raised.value)
    after = meeting.gather("value", 10 * rank + 1, 8)
    meeting.part()
    return before, after, meeting.lost


def test_a_rank_that_falls_silent_is_named_with_what_it_is_at() -> None:
    *results, said = run_ranks(gather_with_one_that_is_busy, 3)
    assert said.startswith("rank 2 hears nothing more of rank 0 at 127.0.0.1:")
    for before, after, lost in results:
        assert before == {0: 0, 1: 10, 2: 20}
        assert after == {0: 1, 1: 11}
        assert lost == {2: "its disk"}


def lose_the_first_rank() -> tuple[float, str]:
    meeting = Meeting(detect_launch(), 60.0)
    meeting.gather("value", 1, 60)
    if meeting.launch.rank == 0:
        time.sleep(3)
        return 0.0, ""
    begun = time.monotonic()
    with pytest.raises(LaunchError) as raised:
        meeting.gather("value", 1, 60)
    return time.monotonic() - begun, str(raised.value)


def test_a_lost_first_rank_is_told_of_at_once() -> None:
    _, (seconds, said) = run_ranks(lose_the_first_rank, 2)
    assert seconds < 30
    assert said.startswith("rank 1 hears nothing more of rank 0 at ")


def meet_twice_at_a_store_that_stays() -> list[dict]:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    launch = detect_launch()
    is_first = launch.rank == 0
    agent = dist.TCPStore(launch.master_addr, launch.master_port, None, is_first, wait_for_workers=False)
    agent.set("missing/all", "[1]")  # of some other user
    said = []
    for use in range(2):
        if not is_first:
            time.sleep(2 * use)  # what it said before is there already
        meeting = Meeting(launch, 60.0)
        said.append(meeting.gather("value", 10 * use + launch.rank, 60))
        meeting.part()
    return said


def test_meetings_at_the_store_of_torchrun_do_not_hear_what_was_said_before() -> None:
    for said in run_ranks(meet_twice_at_a_store_that_stays, 2):
        assert said == [{0: 0, 1: 1}, {0: 10, 1: 11}]


def wait_for_the_first_rank_at_a_store_that_is_there() -> str:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    launch = replace(detect_launch(), rank=1, world_size=2)
    agent = dist.TCPStore(launch.master_addr, launch.master_port, None, True, wait_for_workers=False)
    with pytest.raises(LaunchError) as raised:
        Meeting(launch, 2.0)
    del agent
    return str(raised.value)


def test_a_first_rank_that_does_not_come_to_the_store_of_torchrun_is_told_of() -> None:
    (said,) = run_ranks(wait_for_the_first_rank_at_a_store_that_is_there, 1)
    assert said.startswith("rank 1 cannot reach 127.0.0.1:")
    assert said.endswith("and that rank 0 was started")
