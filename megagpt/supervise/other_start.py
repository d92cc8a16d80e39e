"""Whether an earlier start of a run is still alive: two that write to one folder would harm each other (no torch)."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megagpt.supervise.beats import SECONDS_BETWEEN_BEATS, Beat, BeatFolder, pid_space, process_state, starts
from megagpt.supervise.pulse import Phase

RANKS_LOOKED_AT = 16
"""Of each start; what one rank does not tell, another one does."""


def living_start(parent: Path, sleep: Callable[[float], None] = time.sleep) -> Beat | None:
    """A rank of an earlier start that goes on; None if all have ended.

    A rank whose process number means something here is there or not. One of another host or container is there if it
    beats again within two beats' time; that is waited for only if it has beaten lately by the file system's clock.

    Args:
        parent: holds a folder of beats for each start.
        sleep: waits so many seconds.
    """
    distant: list[tuple[BeatFolder, Beat]] = []
    for folder, beat in _last_beats(parent):
        if beat.pid_space != pid_space():
            distant.append((folder, beat))
        elif process_state(beat.pid, beat.pid_started) is not None:
            return beat
    for _ in range(round(2 * SECONDS_BETWEEN_BEATS) if distant else 0):
        sleep(1.0)
        for folder, beat in distant:
            now = folder.read(beat.rank)
            if now is not None and now.number > beat.number and now.phase is not Phase.LEFT:
                return now
    return None


def wait_for_its_end(
    parent: Path, seconds: float, tell: Callable[[Beat], None], sleep: Callable[[float], None] = time.sleep
) -> Beat | None:
    """Give an earlier start so much time to end.

    Args:
        parent: holds a folder of beats for each start.
        seconds: that it gets.
        tell: told of a rank that goes on, before it is waited for.
        sleep: waits so many seconds.

    Returns:
        A rank that is still there, if any.
    """
    deadline, beat = time.monotonic() + seconds, living_start(parent, sleep)
    if beat is not None:
        tell(beat)
    while beat is not None and time.monotonic() < deadline:
        sleep(1.0)
        beat = living_start(parent, sleep)
    return beat


def _last_beats(parent: Path) -> Iterator[tuple[BeatFolder, Beat]]:
    """Of the first ranks of each start that nothing has ended, as far as they are fresh."""
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".now-") as file:
            now = os.stat(file.name).st_mtime  # by the clock that stamps the beats
    except FileNotFoundError:  # there was none, or it has just ended
        return
    for path in starts(parent):
        folder = BeatFolder(path)
        if folder.verdict() is not None:
            continue
        for file_of_rank in sorted(path.glob("rank-*.json"))[:RANKS_LOOKED_AT]:
            beat = folder.read(int(file_of_rank.stem.partition("-")[2]))
            if beat is None or beat.phase is Phase.LEFT:
                continue
            if now - _written_at(file_of_rank) <= 3 * SECONDS_BETWEEN_BEATS:
                yield folder, beat


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
