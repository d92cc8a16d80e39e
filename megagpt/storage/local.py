"""Local files which are either whole or absent: written under a temporary name, flushed to disk, then renamed."""

import glob
import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Have the operating system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name in the same folder (so that renaming is atomic), told apart by the process that writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporary(*finals: Path) -> None:
    """Remove what killed processes have left of files; only for whoever knows that no other one writes them."""
    for final in finals:
        for path in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
            path.unlink(missing_ok=True)


def publish(temporary: Path, final: Path) -> None:
    """Rename a file that is already on disk to its final name and make the new name durable.

    Raises:
        OSError: the rename failed; the temporary file is still there.
    """
    os.replace(temporary, final)
    sync_path(final.parent)


def write_whole(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; its folder must exist.

    Args:
        path: the file.
        content: all of it.
        durable: wait until the disk has it; without that a crash of the machine (not of the process) may empty it.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            publish(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
