"""Sums of pairs and of all ranks, right, wrong and hanging."""

import os
import time

import pytest
import torch.distributed as dist
from ranks import run_ranks

from megagpt.parallel.launch import detect_launch
from megagpt.preflight import collectives
from megagpt.preflight.collectives import Sum, check_collectives, judge_sums
from megagpt.preflight.meeting import Meeting

pytestmark = pytest.mark.usefixtures("libraries")
ALL_PAIRS = "all 3 pairs of hosts"


def checked(hosts: list[str], fault: str = "") -> list[tuple[str, str]]:
    """(status, text) of each finding, of a job whose ranks are on these hosts."""
    collectives.SLOW_SHARE = 0.0  # this machine may be busy
    if "hangs" in fault:
        collectives.PAIR_SECONDS = collectives.ALL_SECONDS = 12.0
    plant(fault, int(os.environ["RANK"]))
    meeting = Meeting(detect_launch(), 60.0)
    findings = check_collectives(meeting, hosts)
    meeting.part()
    return [(finding.status, finding.text) for finding in findings]


def plant(fault: str, rank: int) -> None:
    timed, add_up = collectives._Sums._timed, dist.all_reduce

    def hang(self, numbers, members):
        if (fault == "link hangs" and members == (1, 2)) or (fault == "all hangs" and len(members) == 3):
            time.sleep(1000)
        return timed(self, numbers, members)

    def spoil(values, *args, **kwargs):
        add_up(values, *args, **kwargs)
        if fault == "wrong" and rank == 2 and len(values) > 5:
            values[5] += 1

    def die(self, numbers, members):
        if rank == 2:
            os._exit(3)
        return timed(self, numbers, members)

    collectives._Sums._timed = die if fault == "dies" else hang  # type: ignore[method-assign,assignment]
    dist.all_reduce = spoil


def test_right_sums_are_told_of_with_their_speed() -> None:
    for findings in run_ranks(checked, 4, ["node1", "node1", "node2", "node2"]):
        assert [status for status, _ in findings] == ["OK", "OK"]
        assert findings[0][1].startswith("gloo: 1 pair of hosts sum rightly, ")
        assert "Gbit/s between two ranks" in findings[0][1]
        assert findings[1][1].startswith("gloo: sums over 4 ranks are right, 1 MiB in ")


def test_ranks_of_one_host_are_summed_over_all() -> None:
    for findings in run_ranks(checked, 2, ["node1", "node1"]):
        assert [status for status, _ in findings] == ["OK"]


def test_a_link_that_hangs_is_named_alone() -> None:
    for findings in run_ranks(checked, 3, ["node1", "node2", "node3"], "link hangs"):
        ((status, text),) = findings
        assert status == "failed"
        assert text == f"gloo, {ALL_PAIRS}: node2 and node3: a sum over ranks 1 and 2 has not ended within 12 s"


def test_a_sum_over_all_ranks_that_hangs_is_told_of() -> None:
    for findings in run_ranks(checked, 3, ["node1", "node2", "node3"], "all hangs"):
        assert [status for status, _ in findings] == ["OK", "failed"]
        assert findings[1][1].startswith(
            "gloo: a sum over all 3 ranks: on rank 0 on node1 it has not ended within 12 s; on rank 1 on node2 it "
        )


def test_a_host_that_adds_up_wrongly_is_in_each_pair_that_is_named() -> None:
    for findings in run_ranks(checked, 3, ["node1", "node2", "node3"], "wrong"):
        ((status, text),) = findings
        assert status == "failed"
        assert "node1 and node3: a sum over ranks 0 and 2 comes out wrong (rank 2)" in text
        assert "node2 and node3: a sum over ranks 1 and 2 comes out wrong (rank 2)" in text
        assert "node1 and node2" not in text


def test_a_process_that_dies_of_a_sum_ends_nothing() -> None:
    for findings in run_ranks(checked, 3, ["node1", "node2", "node3"], "dies"):
        ((status, text),) = findings
        assert status == "failed"
        assert "node2 and node3: a sum over ranks 1 and 2 has ended its process (rank 2)" in text
        assert "node1 and node2" not in text


def test_a_slow_pair_among_fast_ones_is_named() -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    sums = [Sum(pair, (0, 1), "", seconds) for pair, seconds in zip(pairs, (0.001, 0.01, 0.0011), strict=True)]
    (finding,) = judge_sums(sums, "gloo", ALL_PAIRS)
    assert finding.status == "warning"
    assert finding.text == "gloo: a and c sum 0.84 Gbit/s over ranks 0 and 1 (median 7.63)"
    (finding,) = judge_sums(sums[:2], "gloo", ALL_PAIRS)
    assert finding.status == "OK", "of two none is the usual one"
