"""Checks that a host does by itself: libraries, devices, limits, folders, data, and the Plan against its memory."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from megagpt import __version__
from megagpt.data.run_data import open_data
from megagpt.errors import MegagptError, StorageError
from megagpt.plan import Plan
from megagpt.preflight.findings import Finding, failed, ok, warning
from megagpt.storage import RemotePath, location

GIB = 1 << 30
_LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy", "safetensors", "sentencepiece")
_FEWEST_FILES = 4096
_LEAST_SHARED_MEMORY = 1 * GIB
MEMORY_SHARE = 0.9
"""Of a device's memory that the estimate may take: buckets and the framework come on top."""


def versions() -> dict[str, str]:
    """Versions of all that must be alike on every host."""
    found = {"python": platform.python_version(), "megagpt": __version__, "source": _source_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _driver()
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def checks(plan: Plan, ranks_on_host: int | None, is_first: bool) -> dict[str, Callable[[], Finding]]:
    """All checks of this host by name.

    Args:
        plan: of the run.
        ranks_on_host: how many of its ranks this host has; None: not known, as the run is not started yet.
        is_first: whether this is the one host that tries out what all of them share.
    """
    ranks = ranks_on_host or plan.world_size
    return {
        "devices": lambda: check_devices(ranks),
        "memory": lambda: check_memory(plan, ranks),
        "shared memory": check_shared_memory,
        "limits": check_limits,
        "disk": lambda: check_disk(plan),
        "data": lambda: check_data(plan),
    }


def check_devices(ranks_on_host: int) -> Finding:
    """A GPU per rank that computes, or none at all."""
    name, count = "devices", torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if shutil.which("nvidia-smi") and _driver() != "unknown":
            return failed(name, f"the driver {_driver()} is there but torch {torch.__version__} sees no GPU",
                          "install a torch built for this driver, or show the GPUs (CUDA_VISIBLE_DEVICES)")  # fmt: skip
        return ok(name, "no GPUs: ranks run on CPUs")
    if 1 < count < ranks_on_host:
        return failed(name, f"{count} GPUs for {ranks_on_host} ranks", "start a rank per GPU, or show more GPUs")
    try:
        for index in range(count):
            ones = torch.ones(256, 256, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 256.0**3:
                return failed(name, f"GPU {index} computes wrong products", "take the node out of service")
    except RuntimeError as error:
        return failed(
            name, f"GPU {index}: {str(error).splitlines()[0]}", "reset the GPU or take the node out of service"
        )
    return ok(name, f"{count} x {torch.cuda.get_device_name(0)}, each computes")


def check_memory(plan: Plan, ranks_on_host: int) -> Finding:
    """The Plan's estimate per rank against what there is."""
    if torch.cuda.is_available():
        capacity, what = torch.cuda.get_device_properties(0).total_memory, "of a GPU"
    else:
        capacity, what = psutil.virtual_memory().available // max(ranks_on_host, 1), "of free memory per rank"
    need, text = (
        plan.memory.total,
        f"{plan.memory.total / GIB:.2f} GiB estimated per rank, {capacity / GIB:.2f} GiB {what}",
    )
    if need > capacity:
        return failed("memory", text, "smaller micro-batches, recomputation or more ranks: see tools/plan.py")
    if need > MEMORY_SHARE * capacity:
        return warning("memory", text, "this may just not fit: buckets and the framework come on top")
    return ok("memory", text)


def check_shared_memory(path: str = "/dev/shm") -> Finding:
    """Room in /dev/shm, through which NCCL and data workers of one host talk."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return warning("shared memory", f"{path}: {error.strerror}", "mount a tmpfs there")
    if free < _LEAST_SHARED_MEMORY:
        return warning("shared memory", f"{path} has {free / GIB:.2f} GiB free",
                       "remove what killed jobs left there; in a container give it more (--shm-size)")  # fmt: skip
    return ok("shared memory", f"{path} has {free / GIB:.0f} GiB free")


def check_limits() -> Finding:
    """Open files, and locked memory where there is InfiniBand."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if files < _FEWEST_FILES:
        return warning("limits", f"only {files} open files", f"ulimit -n {_FEWEST_FILES} or more in the batch file")
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        return failed("limits", f"locked memory is limited to {locked:,} bytes, which InfiniBand cannot live with",
                      "ulimit -l unlimited, in slurmd's unit too (LimitMEMLOCK=infinity)")  # fmt: skip
    return ok("limits", f"{files:,} open files")


def checkpoint_bytes(plan: Plan) -> int:
    """Size of one checkpoint: fp32 weights and the optimizer's moments."""
    return plan.num_parameters * 4 * (3 if plan.run.optimizer.name == "adamw" else 1)


def check_disk(plan: Plan) -> Finding:
    """Room for the checkpoints that are kept, and one that is being written."""
    directory = plan.run.checkpoint.directory
    if directory is None:
        return warning("disk", "checkpoint.directory is not set", "set it, or nothing will be saved")
    place = location(directory)
    if isinstance(place, RemotePath):
        return _check_store(place)
    path = nearest_folder(directory)
    count = plan.run.checkpoint.keep_last + 1
    need, free = count * checkpoint_bytes(plan), shutil.disk_usage(path).free
    text = f"{count} checkpoints of {checkpoint_bytes(plan) / GIB:.2f} GiB, {free / GIB:.2f} GiB free in {path}"
    if not os.access(path, os.W_OK):
        return failed("disk", f"{path} cannot be written to", "give a writable checkpoint.directory")
    if need > free:
        return failed("disk", text, "free space, or keep fewer (checkpoint.keep_last)")
    return ok("disk", text)


def _check_store(place: RemotePath) -> Finding:
    try:
        place.require_writable()
    except StorageError as error:
        return failed("disk", str(error), "mend that, or give another checkpoint.directory")
    return ok("disk", f"{place} can be written to and read from")


def check_data(plan: Plan) -> Finding:
    """Dataset and tokenizer as the run would open them."""
    if not plan.run.data.mixed:
        return warning("data", "data.prefix is not set", "set it to look at the dataset too")
    try:
        data = open_data(plan.run.data, plan.model.vocab_size, plan.seq_length, plan.run.training.seed)
        data.train.sample(0)
    except (MegagptError, OSError) as error:
        return failed("data", str(error).splitlines()[0], "every host must see the same files at the same path")
    return ok("data", f"dataset and tokenizer can be read, and fit a model of {plan.model.vocab_size:,} tokens")


def nearest_folder(directory: str) -> Path:
    """The folder itself, or the nearest one above that exists."""
    path = Path(directory).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return lines[0] if lines else "unknown"


def _source_version() -> str:
    """A hash of the package's own files: a stale copy on one host goes by the same version number."""
    import hashlib

    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
