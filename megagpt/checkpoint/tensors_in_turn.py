"""What a rank saves, one tensor after the other: those on a disk come into memory in groups, when their turn comes."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from torch import Tensor

from megagpt.checkpoint.state import TrainedModel


def fragment_tensors(fragment: Any, moments: Sequence[str]) -> dict[str, Tensor]:
    """Master weights and moments of a fragment in memory, by name in the file; not copied."""
    tensors = {f"weight/{fragment.name}": fragment.master}
    return tensors | {f"{key}/{fragment.name}": fragment.moment(key) for key in moments}


class TensorsInTurn:
    """Gives the tensors of a file.

    Args:
        engine: has what is on a disk.
        moments: names of the optimizer's state tensors.
        tensors: all of the file, in the order in which they will be asked for; on the meta device those on a disk, one
            group after the other.
    """

    def __init__(self, engine: TrainedModel, moments: Sequence[str], tensors: Mapping[str, Tensor]):
        self._engine, self._moments, self._tensors = engine, moments, tensors
        self._groups: Generator[list[Any], None, None] | None = None
        self._here: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """A tensor, valid until the next one is asked for; after the last one they may be asked for again."""
        if not self._tensors[name].is_meta:
            return self._tensors[name]
        while name not in self._here:
            self._here = {}
            if self._groups is None:
                self._groups = self._engine.groups_in_memory()
            group = next(self._groups, None)
            if group is None:
                self._groups = None
                continue
            for fragment in group:
                self._here |= fragment_tensors(fragment, self._moments)
        return self._here[name]

    def close(self) -> None:
        """Let go of the group that is in memory."""
        self._here = {}
        if self._groups is not None:
            self._groups.close()
            self._groups = None
