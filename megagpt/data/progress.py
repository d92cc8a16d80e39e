"""Progress of a long command: a bar on a terminal, a line now and then elsewhere (batch jobs keep their logs)."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Reports on stderr how many of `total_bytes` are done, how fast, and how long it will take; a context manager."""

    def __init__(self, title: str, total_bytes: int):
        self._title = title
        self._total = max(total_bytes, 1)
        self._done = self._tokens = self._skipped = 0
        self._started_at = self._reported_at = time.monotonic()
        self._bar = self._make_bar()

    @staticmethod
    def _make_bar() -> "Progress | None":
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        speed = TextColumn("{task.fields[speed]}")
        return Progress(*columns, speed, TimeRemainingColumn(), console=Console(stderr=True), transient=True)

    def __enter__(self) -> "ByteProgress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, speed="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, num_bytes: int) -> None:
        """Count bytes that an earlier run has done."""
        self._skipped += num_bytes
        self.advance(num_bytes)

    def advance(self, num_bytes: int, num_tokens: int = 0) -> None:
        """Count bytes as done, with the tokens that they gave, and report if it is time."""
        self._done += num_bytes
        self._tokens += num_tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, speed=self._speed(now))
        elif now - self._reported_at >= _SECONDS_BETWEEN_LINES:
            self._reported_at = now
            done, total = self._done / 1e6, self._total / 1e6
            rate = self._rate(now)
            left = f", {_duration((self._total - self._done) / rate)} left" if rate else ""
            print(
                f"{self._title}: {done:.0f} of {total:.0f} MB ({done / total:.0%}), {self._speed(now)}{left}",
                file=sys.stderr,
                flush=True,
            )

    def _rate(self, now: float) -> float:
        """Bytes per second."""
        return (self._done - self._skipped) / max(now - self._started_at, 1e-3)

    def _speed(self, now: float) -> str:
        speed = f"{self._rate(now) / 1e6:.1f} MB/s"
        if self._tokens:
            speed += f", {self._tokens / max(now - self._started_at, 1e-3) / 1e6:.2f} M tokens/s"
        return speed


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
