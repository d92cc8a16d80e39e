"""Who waits for whom: from what each rank was doing to one paragraph that names the rank that holds up all others.

Pure: nothing is read or written here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.supervise.beats import Beat
from megagpt.supervise.pulse import Phase

Condition = Literal["alive", "frozen", "gone"]
_GRAVITY = {"gone": 0, "frozen": 1, "alive": 2}
_NEIGHBOUR = {
    Phase.RECEIVE_ACTIVATION: (-1, "waits for the activation of stage {}"),
    Phase.RECEIVE_GRADIENT: (1, "waits for the gradient of stage {}"),
    Phase.SEND_ACTIVATION: (1, "waits for its activation to be taken by stage {}"),
    Phase.SEND_GRADIENT: (-1, "waits for its gradient to be taken by stage {}"),
}
_WITHIN_STAGE = {Phase.FORWARD, Phase.BACKWARD}
"""Tensor- and context-parallel ranks, and those that share ZeRO's weights, wait for each other inside of these."""
_EVERYONE = {Phase.REDUCE, Phase.UPDATE, Phase.BETWEEN, Phase.EVALUATE, Phase.SAVE, Phase.RESTORE}


@dataclass(frozen=True)
class Seen:
    """A rank as another one sees it."""

    beat: Beat
    condition: Condition
    detail: str = ""
    """What the host knows of its process."""

    @property
    def name(self) -> str:
        return f"rank {self.beat.rank} on {self.beat.host}"

    @property
    def place(self) -> str:
        """Stage, step and micro-batch."""
        micro = "" if self.beat.microbatch is None else f", micro-batch {self.beat.microbatch}"
        return f"stage {self.beat.stage}, step {self.beat.step + 1}{micro}"


def find_culprits(ranks: Sequence[Seen]) -> list[tuple[Seen, Seen | None]]:
    """Ranks that wait for nobody although others wait for them, each with one that waits for it; worst first."""
    found: dict[int, tuple[Seen, Seen | None]] = {}
    for rank in ranks:
        previous, current, visited = None, rank, {rank.beat.rank}
        while (awaited := _awaited(current, ranks)) is not None and awaited.beat.rank not in visited:
            previous, current = current, awaited
            visited.add(awaited.beat.rank)
        if current.beat.rank not in found or found[current.beat.rank][1] is None:
            found[current.beat.rank] = (current, previous)
    return sorted(found.values(), key=lambda pair: (_GRAVITY[pair[0].condition], pair[0].beat.rank))


def find_stuck_transfers(ranks: Sequence[Seen]) -> list[tuple[Seen, Seen]]:
    """Pairs of ranks of which each waits for the other: what one sends does not arrive."""
    pairs = []
    for rank in ranks:
        other = _awaited(rank, ranks)
        if other is not None and rank.beat.rank < other.beat.rank and _awaited(other, ranks) is rank:
            pairs.append((rank, other))
    return pairs


def _awaited(rank: Seen, ranks: Sequence[Seen]) -> Seen | None:
    """The rank that one waits for, None if it waits for nobody."""
    if rank.condition != "alive":
        return None
    phase = rank.beat.phase
    if phase in _NEIGHBOUR:
        stage = rank.beat.stage + _NEIGHBOUR[phase][0]
        place = (stage, rank.beat.data, rank.beat.context, rank.beat.tensor)
        return next((other for other in ranks if _place(other) == place), None)
    if phase == Phase.RECEIVE_SAMPLES:
        replica = [other for other in ranks if other.beat.data == rank.beat.data]
        return min(replica, key=lambda other: other.beat.rank)
    if phase in _WITHIN_STAGE:
        return _most_behind([other for other in ranks if other.beat.stage == rank.beat.stage], rank)
    if phase in _EVERYONE:
        others = [other for other in ranks if other.condition != "alive" or other.beat.phase not in _EVERYONE]
        behind = [other for other in ranks if other.beat.step < rank.beat.step]
        same_stage = [other for other in ranks if other.beat.stage == rank.beat.stage]
        return _most_behind(others + behind, rank, by_count=False) or _most_behind(same_stage, rank)
    return None


def _place(seen: Seen) -> tuple[int, int, int, int]:
    beat = seen.beat
    return beat.stage, beat.data, beat.context, beat.tensor


def _most_behind(candidates: list[Seen], rank: Seen, by_count: bool = True) -> Seen | None:
    """Ranks of one stage enter the same phases in the same order, so the one that has entered fewest is behind."""
    candidates = [
        other
        for other in candidates
        if other.beat.rank != rank.beat.rank
        and (other.condition != "alive" or not by_count or other.beat.count < rank.beat.count)
    ]
    return min(candidates, key=lambda other: (_GRAVITY[other.condition], other.beat.count), default=None)


def explain(ranks: Sequence[Seen], stacks: str) -> tuple[str, list[Seen]]:
    """One paragraph about a job in which no rank goes on, and the culprits.

    Args:
        ranks: all ranks of the job.
        stacks: where the Python stacks lie.
    """
    still_for = min((rank.beat.still_for for rank in ranks if rank.condition == "alive"), default=0.0)
    sentences = [f"no rank has made progress for {still_for:.0f} s"]
    transfers = find_stuck_transfers(ranks)
    in_transfer = [rank for pair in transfers for rank in pair]
    waited_for = [
        (culprit, waiting)
        for culprit, waiting in find_culprits(ranks)
        if culprit not in in_transfer and (waiting is not None or culprit.condition != "alive")
    ]
    sentences += _transfer_sentences(transfers)
    if not waited_for and not transfers:
        phases = ", ".join(sorted({str(rank.beat.phase) for rank in ranks}))
        sentences.append(
            f"all ranks are in the same place ({phases}), so that none holds up the others: look at the network "
            "between their hosts"
        )
        return _joined(sentences, stacks), []
    for culprit, waiting in waited_for[:4]:
        sentences.append(_sentence(culprit, waiting))
    if len(waited_for) > 4:
        sentences.append(f"{len(waited_for) - 4} more ranks hold up others")
    return _joined(sentences, stacks), [*in_transfer, *(culprit for culprit, _ in waited_for)]


def _transfer_sentences(transfers: Sequence[tuple[Seen, Seen]]) -> list[str]:
    """One for each pair of hosts; one pair of ranks stands for all between them."""
    by_hosts: dict[tuple[str, ...], list[tuple[Seen, Seen]]] = {}
    for pair in transfers:
        by_hosts.setdefault(tuple(sorted({rank.beat.host for rank in pair})), []).append(pair)
    sentences = []
    for hosts, pairs in list(by_hosts.items())[:4]:
        one, other = pairs[0]
        more = f" (and so do {len(pairs) - 1} more pairs of ranks there)" if len(pairs) > 1 else ""
        where = f"the network between {' and '.join(hosts)}" if len(hosts) > 1 else f"how processes of {hosts[0]} talk"
        sentences.append(
            f"{one.name} ({one.beat.phase}, {one.place}) and {other.name} ({other.beat.phase}, {other.place}) wait for "
            f"each other{more}, so that what one sends does not reach the other: look at {where}"
        )
    return sentences


def describe_lost(rank: Seen) -> str:
    """A sentence about a rank that is gone or frozen."""
    beat = rank.beat
    if rank.condition == "gone":
        why = rank.detail or "it was killed, or its host was lost: see the log of its kernel and of the scheduler"
        where = f"last seen in {beat.phase} ({rank.place})"
        return f"{rank.name} is gone: its process {beat.pid} ended without a word, {where}; {why}"
    how = rank.detail or "nothing is heard of it: its host or the way to the shared folder is lost"
    return f"{rank.name} does not run any more: {how}; it was last seen in {beat.phase} ({rank.place})"


def _sentence(culprit: Seen, waiting: Seen | None) -> str:
    beat = culprit.beat
    if culprit.condition != "alive":
        what = describe_lost(culprit)
        return what if waiting is None else f"{_waits(waiting, culprit)}: {what}"
    where = f" at {beat.where}" if beat.where else ""
    assert waiting is not None, "an alive culprit is one that another rank waits for"
    return (
        f"{_waits(waiting, culprit)}, whose {culprit.name} has stopped in {beat.phase}{where} "
        f"(step {beat.step + 1}{'' if beat.microbatch is None else f', micro-batch {beat.microbatch}'}) for "
        f"{beat.still_for:.0f} s"
    )


def _waits(waiting: Seen, culprit: Seen) -> str:
    phase = waiting.beat.phase
    if phase in _NEIGHBOUR:
        what = _NEIGHBOUR[phase][1].format(culprit.beat.stage)
    elif phase == Phase.RECEIVE_SAMPLES:
        what = f"waits for samples of stage {culprit.beat.stage}"
    elif phase in _WITHIN_STAGE:
        what = f"waits in {phase} for the other ranks of stage {culprit.beat.stage}"
    else:
        what = f"waits in {phase} for stage {culprit.beat.stage}"
    return f"{waiting.name} ({waiting.place}) {what}"


def _joined(sentences: list[str], stacks: str) -> str:
    return "; ".join(sentences) + f". Python stacks of all ranks: {stacks}"
