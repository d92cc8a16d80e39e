"""Local files which are either whole or absent: written under a temporary name, flushed to disk, then renamed."""

import ctypes
import functools
import glob
import os
from pathlib import Path
from typing import Any

_EARLY_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: begin to write dirty pages, wait for nothing


def sync_path(path: Path) -> None:
    """Have the operating system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class EarlySync:
    """Has the system write a growing file to the disk while it is still being made, so that syncing it in the end does
    not wait for all of it.

    Args:
        descriptor: of the file, which grows from its start to its end.
    """

    def __init__(self, descriptor: int):
        self._descriptor, self._begun, self._end = descriptor, 0, 0

    def wrote(self, count: int) -> None:
        """Tell that so many more bytes have been written."""
        self._end += count
        if self._end - self._begun >= _EARLY_BYTES:
            if (start := _start_of_writing()) is not None:
                start(self._descriptor, self._begun, self._end - self._begun, _SYNC_FILE_RANGE_WRITE)
            self._begun = self._end


@functools.cache
def _start_of_writing() -> Any:
    """Linux' sync_file_range, of which errors do not matter: syncing comes later. None elsewhere."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


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
