"""Whether to stop: a signal to any rank, or the scheduler's time limit, lets all ranks save together and leave."""

import time
from typing import Protocol

from megagpt.signals import StopSignal
from megagpt.supervise.deadline import Deadline


class Votes(Protocol):
    """What is needed of the ranks; see `Consensus`."""

    def now(self, *votes: int) -> list[int]: ...
    def vote(self, *votes: int) -> list[int]: ...


class Stopping:
    """Asks all ranks after each step; the answer is that of the step before.

    Args:
        signal: what this process was sent.
        deadline: the time limit as this rank knows it.
        votes: of all ranks, two integers wide.
    """

    def __init__(self, signal: StopSignal, deadline: Deadline, votes: Votes):
        self.signal, self.deadline, self._votes = signal, deadline, votes
        self._last = time.monotonic()

    def before_the_first_step(self, evaluations: int = 0) -> str | None:
        """Why the run should not even start; collective, waits for all ranks.

        Args:
            evaluations: here as in `after_step` those that are due until the run can stop the next time.
        """
        self._last = time.monotonic()
        return _words(self._votes.now(*self._mine(evaluations)))

    def after_step(self, evaluations: int = 0) -> str | None:
        """Why the run should stop now, None to go on; the same on all ranks."""
        now = time.monotonic()
        self.deadline.note_step(now - self._last)
        self._last = now
        return _words(self._votes.vote(*self._mine(evaluations)))

    def note_evaluation(self, seconds: float) -> None:
        """An evaluation took so long; it counts as no part of a step."""
        self.deadline.note_evaluation(seconds)
        self._last = time.monotonic()

    def note_save(self, seconds: float) -> None:
        """A save took so long; it counts as no part of a step."""
        self.deadline.note_save(seconds)
        self._last = time.monotonic()

    def _mine(self, evaluations: int) -> tuple[int, int]:
        received = self.signal.received
        return (0 if received is None else int(received)), int(self.deadline.is_near(evaluations))


def _words(votes: list[int]) -> str | None:
    number, is_late = votes
    if number:
        return "stopped by a signal"
    return "stopped before the time limit" if is_late else None
