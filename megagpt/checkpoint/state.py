"""What checkpoints save and restore: the place in the run, and a model as an engine holds it."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int = 0
    """Steps done: global batches consumed."""
    samples: int = 0
    """Training samples consumed."""
    updates: int = 0
    """Updates that the optimizer has made: steps that fp16 did not skip, since the optimizer last started afresh."""
    evaluated: bool = False
    """Whether the validation loss at this very step is known."""

    def advance(self, samples: int, skipped: bool = False) -> "TrainState":
        """The state after one more step on `samples` samples."""
        return TrainState(self.step + 1, self.samples + samples, self.updates + (not skipped))


class TrainedModel(Protocol):
    """What checkpoints need of an engine."""

    parameters: dict[str, Any]

    @property
    def optimizer_is_on_disk(self) -> bool: ...
    def fragments(self) -> list[Any]: ...
    def groups_in_memory(self, change: bool = False) -> Generator[list[Any], None, None]: ...
    def load_weight(self, name: str, shard: Tensor) -> None: ...
    def shard_shape(self, name: str) -> tuple[int, ...]: ...
    def logits(self, tokens_BS: Tensor, rows: int, positions: int) -> Tensor | None: ...
    def loss_scale_state(self) -> dict[str, float] | None: ...
    def set_loss_scale_state(self, state: dict[str, float]) -> None: ...
