"""Who meets whom."""

from itertools import combinations

import pytest

from megagpt.preflight.tournament import MOST_FOR_ALL_PAIRS, Tournament


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, MOST_FOR_ALL_PAIRS])
def test_all_pairs_meet_once_and_no_host_meets_two_at_a_time(count: int) -> None:
    hosts = [f"node{number:02}" for number in range(count)]
    tournament = Tournament(hosts)
    rounds = list(tournament.rounds())
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(hosts, 2))
    for pairs in rounds:
        met = [host for pair in pairs for host in pair]
        assert len(met) == len(set(met))
    assert len(rounds) <= count


@pytest.mark.parametrize("count", [MOST_FOR_ALL_PAIRS + 1, 64, 1000])
def test_of_many_hosts_each_meets_some_in_few_rounds(count: int) -> None:
    tournament = Tournament([f"node{number:04}" for number in range(count)])
    rounds = list(tournament.rounds())
    assert len(rounds) == (count - 1).bit_length()
    for pairs in rounds:
        met = [host for pair in pairs for host in pair]
        assert len(met) == len(set(met))
    assert {host for pairs in rounds for pair in pairs for host in pair} == set(tournament.hosts)
    assert tournament.extent == f"{tournament.num_pairs:,} of {count * (count - 1) // 2:,} pairs of hosts"


def test_a_host_that_has_failed_twice_rests() -> None:
    tournament = Tournament([f"node{number}" for number in range(8)])
    met = []
    for pairs in tournament.rounds():
        for pair in pairs:
            met.append(pair)
            if "node3" in pair:
                tournament.failed(pair)
    assert sum("node3" in pair for pair in met) == 2
    assert len([pair for pair in met if "node3" not in pair]) == 7 * 6 // 2
    assert tournament.extent == "23 of 28 pairs of hosts"
