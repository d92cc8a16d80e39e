"""Ranks that end one after the other because all of them have met the same error: none is taken for lost."""

import os
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest

from megagpt.errors import CheckpointError, RankError
from megagpt.supervise import watchdog as module
from megagpt.supervise.beats import BeatFolder
from megagpt.supervise.watchdog import Limits, Place, Watchdog

LIMITS = Limits(stuck=600.0, silent=600.0)


def watched(folder: Path, rank: int) -> Watchdog:
    place = Place(rank=rank, world_size=2, stage=0, data=rank, context=0, tensor=0)
    return Watchdog(BeatFolder(folder), place, LIMITS, say=lambda text: None, leave=lambda code: None)


def leave_with(folder: Path, error: Exception, disk_is_full: bool, first) -> None:
    """What rank 1 does, in a process of its own, once rank 0 watches it."""
    try:
        with watched(folder, 1) as watchdog:
            first.send(watchdog.first_beat)
            time.sleep(3 * module.LOOK_SECONDS)
            if disk_is_full:

                def write(beat: object) -> None:
                    raise OSError(28, "No space left on device")

                watchdog.folder.write = write
            raise error
    except (CheckpointError, RankError):
        pass


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the child takes no lock
@pytest.mark.parametrize(
    ("error", "disk_is_full", "is_lost"),
    [
        (CheckpointError("could not be saved"), False, False),
        (CheckpointError("could not be saved"), True, False),
        (RankError("of this rank alone"), False, True),
    ],
)
def test_only_who_fails_alone_is_lost(tmp_path, monkeypatch, error, disk_is_full, is_lost):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    with watched(tmp_path, 0) as watchdog:
        receiver, sender = Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            leave_with(tmp_path, error, disk_is_full, sender)
            os._exit(0)
        watchdog.meet([watchdog.first_beat, receiver.recv()])
        os.waitpid(child, 0)
        time.sleep(5 * module.LOOK_SECONDS)
        verdict = watchdog.folder.verdict()
    assert (verdict is not None) == is_lost
