"""Mixtures keep each dataset's share to within one sample at any prefix, and any place in them is found at once."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data import apportion
from megagpt.data.apportion import Apportionment

EXACT = st.fractions(min_value=0, max_value=10, max_denominator=997)
AWKWARD = st.floats(min_value=0.002, max_value=1).map(Fraction)
SHARES = st.lists(st.one_of(EXACT, AWKWARD), min_size=1, max_size=9).filter(any)
GOLDEN = [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2]


def drawn(shares, num_samples):
    sequence = Apportionment(shares)
    return [sequence.draw(i) for i in range(num_samples)]


@settings(max_examples=60, deadline=None)
@given(SHARES)
def test_error_below_one_sample_at_any_prefix(shares):
    wanted = [Fraction(share) / sum(shares) for share in shares]
    counts = [0] * len(shares)
    for seen, (dataset, number) in enumerate(drawn(shares, 600), start=1):
        assert number == counts[dataset], "its samples come in order, none is left out"
        counts[dataset] += 1
        assert all(abs(count - share * seen) < 1 for count, share in zip(counts, wanted, strict=True))


@pytest.mark.parametrize("shares", [[0.7, 0.1, 0.1, 0.05, 0.05], [1.0], [0.999, 0.0007, 0.0003], [1.0, 0.0, 1.0]])
def test_error_over_long_prefixes(shares):
    exact = [Fraction(repr(share)) for share in shares]
    counts = [0] * len(shares)
    for seen, (dataset, _) in enumerate(drawn(exact, 20_000), start=1):
        counts[dataset] += 1
        error = max(abs(count - share * seen / sum(exact)) for count, share in zip(counts, exact, strict=True))
        assert error < 1
    assert [Apportionment(exact).counts(n) for n in (0, 20_000)] == [[0] * len(shares), counts]


@settings(max_examples=60, deadline=None)
@given(SHARES, st.lists(st.integers(0, 2000), min_size=1, max_size=8))
def test_any_place_is_found_without_what_is_before_it(shares, places):
    whole = drawn(shares, 2001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apportion, "_SLOTS_PER_BLOCK", 32)  # so that most blocks are entered from nowhere
        sequence = Apportionment(shares)
        for place in places:
            assert sequence.draw(place) == whole[place]
            before = [sum(dataset == d for dataset, _ in whole[:place]) for d in range(len(shares))]
            assert sequence.counts(place) == before


def test_golden_sequence():
    # Part of every run that was ever started with this mixture: resuming one must see the same samples.
    assert [dataset for dataset, _ in drawn([Fraction("0.5"), Fraction("0.3"), Fraction("0.2")], 20)] == GOLDEN


def test_far_places_cost_no_more_and_nothing_is_kept():
    shares = [Fraction(share) for share in (0.31830988618, 0.57721566490, 0.10347444892, 0.001)]
    durations = []
    for place in (10**5, 10**15):
        sequence = Apportionment(shares)
        started = time.process_time()
        counts, place_drawn = sequence.counts(place), sequence.draw(place)
        durations.append(time.process_time() - started)
        assert sum(counts) == place
        assert place_drawn.number == counts[place_drawn.dataset]
        assert all(abs(n - s * place / sum(shares)) < 1 for n, s in zip(counts, shares, strict=True))
    assert durations[1] < 10 * durations[0] + 0.05
    for place in range(0, 100 * 4096, 4096):
        sequence.draw(place)
    assert len(sequence._blocks) <= 4
