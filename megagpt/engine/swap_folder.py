"""The folder of one process on a disk for what DeepSpeed keeps there: found fit before work, removed after it.

DeepSpeed's names for its files are the same in every run, so each process has a folder of its own. It holds a lock on
it for as long as it lives, however it ends; a folder whose lock nobody holds is a dead process's, and the next run
removes it.
"""

import contextlib
import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch

from megagpt.errors import ConfigError
from megagpt.launchers import host_name
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan

PREFIX = "megagpt-swap-"
LOCK = "lock"
PROBE_BYTES = 4096
"""Size and place of direct reads and writes are multiples of a disk's blocks."""


class SwapFolder:
    """A new folder, which is this process's until it ends.

    Args:
        parent: where to make it.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path):
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            """The folder."""
            descriptor = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            if _lock(descriptor):
                break
            os.close(descriptor)  # a run that starts at the same time has taken it for a dead one's
        self._finalizer = weakref.finalize(self, _remove, self.path, descriptor, os.getpid())

    def remove(self) -> None:
        """Remove it with all that is in it; nothing if that is done. It is done, too, when the interpreter ends."""
        self._finalizer()


def remove_dead_folders(parent: Path) -> None:
    """Remove the folders of processes that have ended without doing so."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # without a lock it is being made; with one that we may not open, not ours
            descriptor = os.open(folder / LOCK, os.O_RDWR)
            if _lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file that nobody else has locked, and that is still in its folder."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


def _remove(path: Path, descriptor: int, process: int) -> None:
    if process == os.getpid():  # not in what has been forked from it
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def prepare_swap_folder(plan: Plan, ranks: Ranks) -> SwapFolder:
    """Make this rank's folder after a look at what it takes: the extension, the disk and the room on it; collective.

    Raises:
        ConfigError: on all ranks, if one has not what it takes.
    """
    section = plan.deepspeed.raw["zero_optimization"]["offload_optimizer"]
    key, parent = "zero_optimization.offload_optimizer", Path(section["nvme_path"])
    folder, problem = None, _extension_problem(key)
    if problem is None:
        try:
            remove_dead_folders(parent)
            folder = SwapFolder(parent)
            _write_directly(folder.path / "probe")
        except OSError as error:
            problem = (
                f"{key}.nvme_path={parent} cannot be used on host {host_name()} ({error.strerror}); give a "
                "folder that exists and can be written to on each host, on a local disk with room and direct I/O"
            )
    problems = list(dict.fromkeys(filter(None, ranks.gather_objects(problem))))
    if not problems:  # by now all ranks have removed what they could
        disk = host_name(), os.stat(parent).st_dev, shutil.disk_usage(parent).free
        found = ranks.gather_objects((disk, plan.memory_per_stage[ranks.pipeline_rank].disk))
        problems = _room_problems(f"{key}.nvme_path={parent}", found)
    if problems:
        if folder is not None:
            folder.remove()
        raise ConfigError([f"{plan.deepspeed.source}: {problem}" for problem in problems])
    assert folder is not None
    return folder


def _extension_problem(key: str) -> str | None:
    """Why DeepSpeed's extension for disks does not load; the first time it is compiled, in a minute or more."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load()
    except Exception as error:  # whatever compilers, torch and DeepSpeed raise
        why = " ".join(str(error).split()) or type(error).__name__
        toolkit = ", the CUDA toolkit (nvcc; CUDA_HOME names it)" if torch.cuda.is_available() else ""
        return (
            f'{key}.device="nvme" needs DeepSpeed\'s extension async_io, which does not load on host '
            f"{host_name()} ({why[:300]}); install libaio with its headers (Debian and Ubuntu: apt install "
            f'libaio-dev), g++ and ninja{toolkit}, or use device="cpu"'
        )
    return None


def _write_directly(path: Path) -> None:
    """Write past the cache, as the extension does."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
    try:
        with mmap.mmap(-1, PROBE_BYTES) as memory:  # direct I/O wants memory that begins with a page
            os.write(descriptor, memory)
    finally:
        os.close(descriptor)
        path.unlink()


def _room_problems(place: str, found: list[tuple[tuple[str, int, int], int]]) -> list[str]:
    """Disks without room for what the ranks of their host have there."""
    needed: dict[tuple[str, int], int] = {}
    free: dict[tuple[str, int], int] = {}
    for (host, device, free_bytes), needed_bytes in found:
        needed[host, device] = needed.get((host, device), 0) + needed_bytes
        free[host, device] = min(free_bytes, free.get((host, device), free_bytes))
    return [
        f"{place}: {needed[disk] / 1e9:,.1f} GB are needed and {free[disk] / 1e9:,.1f} GB are free on host {disk[0]}; "
        "give a larger disk, or free space"
        for disk in needed
        if free[disk] < needed[disk]
    ]
