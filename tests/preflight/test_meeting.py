"""Ranks around a table: some do not come, some fall silent."""

import time
from dataclasses import replace

import pytest
from ranks import run_ranks

from megagpt.errors import LaunchError
from megagpt.parallel.launch import detect_launch
from megagpt.preflight import examine
from megagpt.preflight.meeting import Meeting

pytestmark = pytest.mark.usefixtures("libraries")


def meet_in_a_larger_job(world_size: int) -> tuple[float, list[str]]:
    """Seconds that an examination takes, and its findings, where most ranks are missing."""
    started = Meeting.__init__
    Meeting.__init__ = lambda self, launch: started(self, launch, 4.0)  # type: ignore[method-assign]
    launch = replace(detect_launch(), world_size=world_size, local_rank=0)
    begun = time.monotonic()
    findings = examine(None, launch)  # type: ignore[arg-type]
    return time.monotonic() - begun, [finding.text for finding in findings]


def test_all_missing_ranks_are_waited_for_together_and_one_rank_tells() -> None:
    (seconds, (text,)), (_, others) = run_ranks(meet_in_a_larger_job, 2, 40)
    assert seconds < 20, "not 4 s for each"
    assert text.startswith("of 40 ranks 38 have not come to 127.0.0.1:")
    assert "within 4 s: 2, 3, 4, 5, 6, 7, 8, 9; see what their hosts print" in text
    assert not others


def gather_with_one_that_is_busy() -> tuple[dict, dict, dict] | str:
    meeting = Meeting(detect_launch())
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
    meeting = Meeting(detect_launch())
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
