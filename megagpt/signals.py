"""Ask a run to stop: the signals that a scheduler sends are remembered until the ranks ask.

No torch here: the handlers are installed before the heavy imports, so that no signal is lost.
"""

import signal
from collections.abc import Iterable
from types import FrameType


class StopSignal:
    """Remembers that a signal has come.

    Args:
        signals: which ones; Slurm sends SIGTERM before it takes a job away, SIGUSR1 as asked for by `--signal`.
    """

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)):
        self.received: signal.Signals | None = None
        for number in signals:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
