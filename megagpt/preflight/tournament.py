"""Which hosts meet in which round: a host meets one other at a time, so that no two pairs share a wire (no torch)."""

from collections import Counter
from collections.abc import Iterator, Sequence

MOST_FOR_ALL_PAIRS = 32
"""Hosts of which all pairs meet; of more, those whose numbers differ in one bit do."""
_MOST_FAILURES = 2


class Tournament:
    """Rounds of pairs that can meet all at once; a host that has failed with two others rests.

    Args:
        hosts: in the order of their ranks.
    """

    def __init__(self, hosts: Sequence[str]):
        self.hosts = list(hosts)
        self.num_pairs = 0
        """That have met."""
        self._failures: Counter[str] = Counter()

    def rounds(self) -> Iterator[list[tuple[str, str]]]:
        """The pairs of each round, the host with lower ranks first."""
        for pairs in _schedule(len(self.hosts)):
            named = [(self.hosts[a], self.hosts[b]) for a, b in pairs]
            due = [pair for pair in named if not any(self._failures[host] >= _MOST_FAILURES for host in pair)]
            self.num_pairs += len(due)
            if due:
                yield due

    def failed(self, pair: tuple[str, str]) -> None:
        """Tell that a pair of the last round has failed; all ranks tell the same."""
        self._failures.update(pair)

    @property
    def extent(self) -> str:
        """How many pairs have met, of how many."""
        count = len(self.hosts) * (len(self.hosts) - 1) // 2
        if count == self.num_pairs:
            return "1 pair of hosts" if count == 1 else f"all {count:,} pairs of hosts"
        return f"{self.num_pairs:,} of {count:,} pairs of hosts"


def _schedule(count: int) -> list[list[tuple[int, int]]]:
    if count > MOST_FOR_ALL_PAIRS:  # hypercube: log2(count) rounds, in each of which hosts differ in one bit
        shifts = [1 << bit for bit in range((count - 1).bit_length())]
        return [[(a, a ^ shift) for a in range(count) if a < a ^ shift < count] for shift in shifts]
    # Round-robin by the circle method: one stays, the others go round; with an odd number one rests.
    circle: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    result = []
    for _ in range(len(circle) - 1):
        opposite = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
        result.append(sorted((min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return result
