"""Progress of a long command: a bar on a terminal, a line now and then elsewhere (batch jobs keep their logs)."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Reports on stderr how many of `total_bytes` are done; use as a context manager."""

    def __init__(self, title: str, total_bytes: int):
        self._title = title
        self._total = max(total_bytes, 1)
        self._done = 0
        self._reported_at = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)

    def __enter__(self) -> "ByteProgress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done, and report if it is time."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._reported_at >= _SECONDS_BETWEEN_LINES:
            self._reported_at = time.monotonic()
            done, total = self._done / 1e6, self._total / 1e6
            print(f"{self._title}: {done:.0f} of {total:.0f} MB ({done / total:.0%})", file=sys.stderr, flush=True)
