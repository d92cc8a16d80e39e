"""Which dataset each sample of a mixture comes from: for each number of samples, every dataset has had its share of
them to within less than one sample.

This is the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32, 1980). With a share k / D the j-th
sample of a dataset may be drawn in the slots from floor((j - 1) D / k) to ceil(j D / k) - 1 and in no others: earlier
it would be a whole sample ahead of its share, later a whole one behind. Drawing in each slot, of the samples whose time
has come, the one whose time runs out first keeps all of these bounds (earliest deadline first is optimal for unit jobs,
and the windows of shares that add up to 1 leave no interval overfull).

The rule needs no memory of how its state came about: two runs of it that start from different sets of samples drawn
are the same from the latest deadline in which they differ on. (Of what one run has drawn and the other has not, nothing
ever has a later deadline than in the beginning: each draws what is best, so what comes in is no later than what is
still owed. Once the true run has passed that deadline nothing is owed.) So the state before any slot is found by
starting 1 / (smallest share) slots before it, with as many samples drawn as each share gives, rounded anyhow.
"""

from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

_SLOTS_PER_BLOCK = 4096
_BLOCKS_KEPT = 4


class Draw(NamedTuple):
    """One sample of a mixture."""

    dataset: int
    """Which of the datasets."""
    number: int
    """Samples drawn from it before."""


class _Block(NamedTuple):
    datasets: np.ndarray  # [slots]
    numbers: np.ndarray  # [slots]
    counts: list[int]  # drawn behind the last slot


class Apportionment:
    """An endless sequence of datasets, computed for single indices; nothing is stored but some blocks of it.

    A far index costs 1 / (smallest share) slots of about a microsecond, the one after it nothing.
    """

    def __init__(self, shares: Sequence[Fraction | int]):
        """Describe the sequence.

        Args:
            shares: exact weights, 0 or more, of which one at least is above; they need not add up to 1.
        """
        assert min(shares) >= 0 < max(shares), "weights are checked with the config"
        common = Fraction(1, np.lcm.reduce([Fraction(share).denominator for share in shares], dtype=object))
        numerators = [int(Fraction(share) / common) for share in shares]
        self._numerators = numerators
        self._period = sum(numerators)  # behind as many slots each share is met exactly
        self._active = [d for d, numerator in enumerate(numerators) if numerator]
        self._warm_up = -(-self._period // min(numerators[d] for d in self._active)) + 1
        self._blocks: dict[int, _Block] = {}

    def draw(self, index: int) -> Draw:
        """Which sample of which dataset is number `index` of the mixture, counted from 0."""
        number, slot = divmod(index, _SLOTS_PER_BLOCK)
        block = self._block(number)
        return Draw(int(block.datasets[slot]), int(block.numbers[slot]))

    def counts(self, index: int) -> list[int]:
        """Samples of each dataset among the first `index`."""
        number, slot = divmod(index, _SLOTS_PER_BLOCK)
        if slot == 0:
            return self._counts_before(number)
        counts = self._counts_before(number)
        drawn = np.bincount(self._block(number).datasets[:slot], minlength=len(counts))
        return [count + int(more) for count, more in zip(counts, drawn, strict=True)]

    def _block(self, number: int) -> _Block:
        if number not in self._blocks:
            made = self._run(self._counts_before(number), number * _SLOTS_PER_BLOCK, _SLOTS_PER_BLOCK)
            if len(self._blocks) >= _BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = made
        return self._blocks[number]

    def _counts_before(self, number: int) -> list[int]:
        """Samples drawn of each dataset before block `number`."""
        if number - 1 in self._blocks:
            return list(self._blocks[number - 1].counts)
        slot = number * _SLOTS_PER_BLOCK
        first = max(slot - self._warm_up, slot // self._period * self._period)
        return self._run(self._rounded(first), first, slot - first).counts

    def _rounded(self, slot: int) -> list[int]:
        """Counts that add up to `slot`, each its share rounded down or up."""
        counts = [numerator * slot // self._period for numerator in self._numerators]
        rests = [numerator * slot % self._period for numerator in self._numerators]
        for dataset in sorted(range(len(rests)), key=lambda d: -rests[d])[: slot - sum(counts)]:
            counts[dataset] += 1
        return counts

    def _run(self, counts: list[int], first: int, slots: int) -> _Block:
        """Draw `slots` samples from slot `first` on, after `counts` of each dataset."""
        period, numerators, counts = self._period, self._numerators, list(counts)
        datasets, numbers = np.empty(slots, np.int32), np.empty(slots, np.int64)
        # The next sample of each dataset waits for its time in one heap, and for its turn in the other.
        waiting = [(counts[d] * period // numerators[d], d) for d in self._active]
        heapify(waiting)
        ready: list[tuple[int, int]] = []
        for slot in range(slots):
            while waiting and waiting[0][0] <= first + slot:
                d = heappop(waiting)[1]
                heappush(ready, (-(-(counts[d] + 1) * period // numerators[d]), d))
            d = heappop(ready)[1]
            datasets[slot], numbers[slot] = d, counts[d]
            counts[d] += 1
            heappush(waiting, (counts[d] * period // numerators[d], d))
        return _Block(datasets, numbers, counts)
