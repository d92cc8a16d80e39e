"""Which checkpoints stay: the newest, every so many steps, the best, and those that the user has pinned."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megagpt.checkpoint.manifest import read_manifest
from megagpt.checkpoint.reader import STEP_PREFIX, list_checkpoints
from megagpt.errors import CheckpointError
from megagpt.plan.config import CheckpointConfig
from megagpt.storage.local import sync_path

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

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory, self.config = directory, config
        self._losses: dict[str, float | None] = {}

    def clean(self) -> None:
        """Remove what a run that was killed while saving or deleting has left."""
        for pattern in (f".{STEP_PREFIX}*.tmp", f"{_REMOVED}*"):
            for folder in self.directory.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def replace(self, temporary: Path, final: Path) -> None:
        """Rename a complete checkpoint to its name, and have that on the disk."""
        if final.exists():  # the same step again, after a resume from an older checkpoint
            self._losses.pop(final.name, None)
            remove(final, lambda: os.rename(temporary, final))
        else:
            os.rename(temporary, final)
        sync_path(self.directory)

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
            is_due = every > 0 and int(folder.name.removeprefix(STEP_PREFIX)) % every == 0
            if not is_due and folder not in best and not (folder / PINNED).exists():
                remove(folder)

    def _loss(self, folder: Path) -> tuple[float | None] | None:
        """(validation loss measured at that step, None if it was not); None for a checkpoint without a manifest."""
        if folder.name not in self._losses:
            try:
                manifest = read_manifest(folder)
            except CheckpointError:
                return None
            self._losses[folder.name] = manifest.metrics.get("validation_loss") if manifest.evaluated else None
        return (self._losses[folder.name],)

    def _point(self, name: str, folder: Path) -> None:
        path, temporary = self.directory / name, self.directory / f".{name}.tmp"
        with contextlib.suppress(OSError):
            if path.read_text() == f"{folder.name}\n":
                return
        temporary.write_text(f"{folder.name}\n")
        sync_path(temporary)
        os.replace(temporary, path)
        sync_path(self.directory)


def remove(folder: Path, before_deletion: Callable[[], None] = lambda: None) -> None:
    """Delete a checkpoint so that a kill leaves it whole or away: it is renamed first."""
    hidden = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    before_deletion()
    shutil.rmtree(hidden)
