"""Votes of real ranks."""

import pytest
from ranks import run_ranks
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")


def votes_of(plan) -> list[list[int]]:
    from megagpt.parallel.consensus import Consensus
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks, stop_ranks

    ranks = start_ranks(plan, detect_launch())
    votes = Consensus(ranks, width=2)
    seen = [votes.now(ranks.rank, 0)]
    for step in range(4):
        seen.append(votes.vote(int(ranks.rank == 1 and step == 2), step))
    seen.append(votes.close())
    seen.append(votes.close())
    stop_ranks()
    return seen


def test_all_ranks_learn_of_a_vote_one_step_later() -> None:
    expected = [[2, 0], [0, 0], [0, 0], [0, 1], [1, 2], [0, 3], [0, 0]]
    assert run_ranks(votes_of, 3, _plan(3)) == [expected] * 3


def test_a_single_rank_decides_at_once() -> None:
    assert run_ranks(votes_of, 1, _plan(1)) == [[[0, 0], [0, 0], [0, 1], [0, 2], [0, 3], [0, 0], [0, 0]]]


def _plan(ranks: int):
    return tiny_plan(pp=ranks) if ranks == 3 else tiny_plan()
