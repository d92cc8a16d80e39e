"""Which checkpoints stay: the newest, every so many steps, the best, and those that the user has pinned."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megagpt.checkpoint.manifest import MANIFEST_HASH, read_manifest
from megagpt.checkpoint.reader import list_checkpoints
from megagpt.errors import CheckpointError, StorageError
from megagpt.plan.config import CheckpointConfig
from megagpt.storage import Location, RemotePath
from megagpt.storage.local import sync_path, write_whole
from megagpt.storage.steps import STEP_PREFIX, step_folders, step_of

LATEST = "latest"
BEST = "best"
PINNED = "pinned"
"""An (empty) file of this name in a checkpoint's folder keeps it for ever."""

_REMOVED = ".removed-"


class Retention:
    """Deletes checkpoints of one run and points at the newest and the best one.

    Args:
        directory: of the run's checkpoints.
        config: says how many stay.
    """

    def __init__(self, directory: Location, config: CheckpointConfig):
        self.directory, self.config = directory, config
        self._losses: dict[str, float | None] = {}

    def clean(self) -> None:
        """Remove what a run that was killed while saving or deleting has left."""
        if isinstance(self.directory, RemotePath):
            for left in step_folders(self.directory):
                if not (left / MANIFEST_HASH).is_file():
                    remove(left)
            with contextlib.suppress(StorageError):  # takes a right of its own, and is a matter of thrift only
                self.directory.abandon_uploads()
            return
        for pattern in (f".{STEP_PREFIX}*.tmp", f"{_REMOVED}*"):
            for folder in self.directory.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def replace(self, temporary: Path, final: Path) -> None:
        """Rename a complete (local) checkpoint to its name, and have that on the disk."""
        if final.exists():  # the same step again, after a resume from an older checkpoint
            self._losses.pop(final.name, None)
            remove(final, lambda: os.rename(temporary, final))
        else:
            os.rename(temporary, final)
        sync_path(final.parent)

    def apply(self) -> None:
        """Point at the newest and the best checkpoint, then delete what need not stay; damaged ones stay."""
        losses = {folder: loss for folder in list_checkpoints(self.directory) if (loss := self._loss(folder))}
        intact = list(losses)
        evaluated = sorted((loss, folder.name, folder) for folder, (loss,) in losses.items() if loss is not None)
        best = [folder for _, _, folder in evaluated[: self.config.keep_best]]
        if intact:
            self._point(LATEST, intact[0])
        if evaluated:
            self._point(BEST, evaluated[0][2])
        every = self.config.keep_every
        for folder in intact[self.config.keep_last :]:
            is_due = every > 0 and step_of(folder) % every == 0
            if not is_due and folder not in best and not (folder / PINNED).exists():
                with contextlib.suppress(OSError):  # tried again at the next save, which tells of too little space
                    remove(folder)

    def _loss(self, folder: Location) -> tuple[float | None] | None:
        """(validation loss measured at that step, None if it was not); None for a checkpoint without a manifest."""
        if folder.name not in self._losses:
            try:
                manifest = read_manifest(folder)
            except CheckpointError:
                return None
            self._losses[folder.name] = manifest.metrics.get("validation_loss") if manifest.evaluated else None
        return (self._losses[folder.name],)

    def _point(self, name: str, folder: Location) -> None:
        path, content = self.directory / name, f"{folder.name}\n"
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return
        if isinstance(path, RemotePath):
            path.write_bytes(content.encode())
        else:
            write_whole(path, content.encode())


def set_pinned(folder: Location, pinned: bool) -> None:
    """Keep a checkpoint for ever, or leave it to the run's retention again.

    Raises:
        CheckpointError: its folder cannot be written to.
    """
    try:
        (folder / PINNED).touch() if pinned else (folder / PINNED).unlink(missing_ok=True)
    except OSError as error:
        what = "made" if pinned else "removed"
        raise CheckpointError(f"{folder / PINNED}: cannot be {what} ({error.strerror}); mend its rights") from None


def remove(folder: Location, before_deletion: Callable[[], None] = lambda: None) -> None:
    """Delete a checkpoint so that a kill leaves it whole or away: it is renamed first, or loses what makes it one."""
    if isinstance(folder, RemotePath):
        (folder / MANIFEST_HASH).unlink(missing_ok=True)
        before_deletion()
        folder.remove_tree()
        return
    hidden = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    before_deletion()
    shutil.rmtree(hidden, ignore_errors=True)  # of what others still read on NFS; the next save removes the rest
