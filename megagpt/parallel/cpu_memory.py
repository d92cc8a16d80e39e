"""Memory that is freed on the CPU is kept for the next tensor, as torch's allocator does on GPUs.

The C library gets memory for each large tensor from the system and gives it back at once. The system then fills every
page of the next one with zeros, which takes several times as long as, for example, converting a tensor of 100 MB.
"""

import ctypes
import os

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_USERS_OWN = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
"""Environment variables with which a user tunes glibc's malloc."""


def keep_freed_memory() -> bool:
    """Have this process reuse freed memory; from now on, idempotent.

    Returns:
        Whether it does: not with another C library than glibc, nor where the environment tunes malloc already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _USERS_OWN):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Have this process give freed memory back to the system again, for tools that promise to need little of it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _USERS_OWN):
        mallopt(_M_MMAP_MAX, 65536)  # both as glibc starts with
        mallopt(_M_TRIM_THRESHOLD, 128 << 10)
