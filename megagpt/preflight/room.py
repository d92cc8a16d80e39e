"""Whether a file system gives room for a file: quotas, which free space does not show, refuse it (no torch)."""

import ctypes
import errno
import os
import tempfile
from pathlib import Path

import psutil

_IN_MEMORY = ("tmpfs", "ramfs")
"""Here reserved space is memory."""
_REFUSALS = (errno.ENOSPC, errno.EDQUOT)


def room_for(folder: Path, num_bytes: int) -> str | None:
    """Why a file of this size is refused in a folder; None: it is not, or the file system cannot reserve space.

    The file has no name, so that nothing is left of it whatever happens.
    """
    if _file_system(folder) in _IN_MEMORY:
        return None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), num_bytes)
    except OSError as error:
        return os.strerror(error.errno) if error.errno in _REFUSALS else None
    return None


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Linux' fallocate: posix_fallocate writes every block where the file system cannot reserve."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, 0, 0, num_bytes) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _file_system(folder: Path) -> str:
    """Its kind, by the mount that is nearest above."""
    kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    return next((kinds[path] for path in (place, *place.parents) if path in kinds), "")
