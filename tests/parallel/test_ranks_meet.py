"""Ranks meet before they work: who is missing, or what one of them has met, is said once, and all end alike."""

import re

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("libraries")


def come(host: str, absent: int | None = None, troubled: tuple[int, ...] = (), with_gpu: int | None = None):
    """How the meeting ends for this rank: the type of error, its text and its exit status.

    Args:
        host: first part of the name of each rank's host.
        absent: rank that does not come.
        troubled: ranks that have met something.
        with_gpu: rank that sees a GPU.
    """
    import socket

    import torch

    from megagpt.errors import MegagptError, RankError
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.meeting import meet

    launch = detect_launch()
    socket.gethostname = lambda: f"{host}{launch.rank}"
    torch.cuda.is_available = lambda: launch.rank == with_gpu
    if launch.rank == absent:
        return "", "", 0
    problem = RankError(f"rank {launch.rank} has no data", 2) if launch.rank in troubled else None
    try:
        store = meet(launch, problem, seconds=60.0 if absent is None else 8.0)
    except MegagptError as error:
        return type(error).__name__, str(error), error.exit_code
    if store is None:
        return "", "alone", 0
    store.set(f"heard by {launch.rank}", "")
    if launch.rank == 0:  # the store goes with this process, where in a run the process groups keep it
        store.wait([f"heard by {rank}" for rank in range(launch.world_size)])
    return "", "all have come", 0


def test_ranks_that_all_come_go_on():
    assert run_ranks(come, 3, "node") == [("", "all have come", 0)] * 3
    assert run_ranks(come, 1, "node") == [("", "alone", 0)]


def test_a_rank_that_does_not_come_is_named_once():
    (kind, said, status), *others = run_ranks(come, 4, "node", 2)
    assert re.match(r"1 of 4 ranks have not come to MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+ within 8 s: 2; the ", said)
    assert "the others are on node0, node1, node3: see that" in said
    assert (kind, status) == ("MissingRanksError", 75), "the next start may well find it"
    assert others == [("RankError", "", 75), ("", "", 0), ("RankError", "", 75)]


@pytest.mark.parametrize("troubled", [(0,), (2,), (1, 2)], ids=str)
def test_what_a_rank_has_met_ends_all_of_them_at_once_and_is_said_once(troubled):
    found = run_ranks(come, 3, "node", None, troubled)
    assert {(kind, status) for kind, _, status in found} == {("RankError", 2)}
    (said,) = [text for _, text, _ in found if text]
    assert said in [f"rank {rank} has no data" for rank in troubled]


def test_a_host_that_sees_no_gpu_is_named():
    found = run_ranks(come, 3, "node", None, (), 1)
    assert [(kind, status) for kind, _, status in found] == [("MissingRanksError", 75), *[("RankError", 75)] * 2]
    (said,) = [text for _, text, _ in found if text]
    assert said.startswith("the ranks of node0 see no GPU, but those of node1 do; see that the driver of node0 works")


def test_a_rank_alone_says_what_it_has_met():
    assert run_ranks(come, 1, "node", None, (0,)) == [("RankError", "rank 0 has no data", 2)]
