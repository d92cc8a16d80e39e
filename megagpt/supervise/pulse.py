"""What a rank is doing right now, noted at so little cost that every phase of every micro-batch is noted (no torch)."""

import time
from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """What a rank does or waits for, in the words of a report."""

    START = "starting up"
    RESTORE = "loading a checkpoint"
    DATA = "the data loader"
    RECEIVE_SAMPLES = "waiting for samples"
    FORWARD = "the forward pass"
    BACKWARD = "the backward pass"
    RECEIVE_ACTIVATION = "waiting for an activation"
    RECEIVE_GRADIENT = "waiting for a gradient"
    SEND_ACTIVATION = "sending an activation"
    SEND_GRADIENT = "sending a gradient"
    REDUCE = "summing gradients"
    UPDATE = "the optimizer step"
    BETWEEN = "between two steps"
    EVALUATE = "an evaluation"
    SAVE = "saving a checkpoint"
    LEFT = "done"


SLOW_PHASES = {Phase.START, Phase.RESTORE, Phase.SAVE}
"""They move much data and tell of nothing in between, so more patience is had with them."""


class Moment(NamedTuple):
    """One note of a pulse."""

    phase: Phase
    step: int
    """Steps done."""
    microbatch: int | None
    """Which micro-batch of the step, from 0."""
    entered: int
    """Phases entered so far."""
    since: float
    """When it began (time.monotonic)."""


class Pulse:
    """Written by the thread that trains, read by the one that watches."""

    def __init__(self) -> None:
        self.now = Moment(Phase.START, 0, None, 0, time.monotonic())
        self._microbatches: dict[Phase, int] = {}

    def enter(self, phase: Phase, microbatch: int | None = None) -> None:
        """Note what begins now."""
        before = self.now
        self.now = Moment(phase, before.step, microbatch, before.entered + 1, time.monotonic())

    def enter_next(self, phase: Phase) -> None:
        """Note that the next micro-batch of this step enters a phase."""
        index = self._microbatches.get(phase, 0)
        self._microbatches[phase] = index + 1
        self.enter(phase, index)

    def begin_step(self, step: int) -> None:
        """Note that `step` steps are done and another one begins."""
        self._microbatches.clear()
        self.now = Moment(Phase.BETWEEN, step, None, self.now.entered + 1, time.monotonic())
