"""Checks that a host does by itself: libraries, devices, limits, folders, data, and the Plan against its memory."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megagpt import __version__
from megagpt.data.run_data import open_data
from megagpt.errors import MegagptError, StorageError
from megagpt.parallel.open_files import most_files, needed_files
from megagpt.plan import Plan
from megagpt.preflight.findings import Finding, failed, ok, warning
from megagpt.preflight.memory import check_memory
from megagpt.preflight.room import room_for
from megagpt.storage import RemotePath, location
from megagpt.storage.steps import step_folders

GIB = 1 << 30
_LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy", "safetensors", "sentencepiece")
_FEWEST_FILES = 1024
_LEAST_SHARED_MEMORY = 1 * GIB


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
    return {
        "devices": lambda: check_devices(plan.world_size, ranks_on_host),
        "memory": lambda: check_memory(plan, ranks_on_host),
        "shared memory": check_shared_memory,
        "limits": lambda: check_limits(plan),
        "disk": lambda: check_disk(plan, is_first),
        "data": lambda: check_data(plan),
    }


def check_devices(world_size: int, ranks_on_host: int | None) -> Finding:
    """A GPU per rank that computes, or none at all."""
    name, count = "devices", torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if shutil.which("nvidia-smi") and _driver() != "unknown":
            return failed(name, f"the driver {_driver()} is there but torch {torch.__version__} sees no GPU",
                          "install a torch built for this driver, or show the GPUs (CUDA_VISIBLE_DEVICES)")  # fmt: skip
        return ok(name, "no GPUs: ranks run on CPUs")
    if ranks_on_host is not None and 1 < count < ranks_on_host:
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
    text = f"{count} x {torch.cuda.get_device_name(0)}, each computes"
    if ranks_on_host is None and count < world_size:
        text += f"; {world_size} ranks need {-(-world_size // count)} such hosts"
    return ok(name, text)


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


def check_limits(plan: Plan) -> Finding:
    """Open files, and locked memory where there is InfiniBand."""
    need = needed_files(plan, torch.cuda.is_available())
    files = most_files()  # the run raises the soft limit to it
    text = f"open files: at most {files:,}, of which a rank takes about {need:,}"
    advice = f"allow {max(_FEWEST_FILES, 2 * need):,} (ulimit -Hn; in slurmd's unit LimitNOFILE)"
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if files < need:
        return failed("limits", f"only {files} open files, and a rank takes about {need:,}", advice)
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        return failed("limits", f"locked memory is limited to {locked:,} bytes, which InfiniBand cannot live with",
                      "ulimit -l unlimited, in slurmd's unit too (LimitMEMLOCK=infinity)")  # fmt: skip
    if files < max(_FEWEST_FILES, 1.5 * need):
        return warning("limits", f"only {files} open files, of which a rank takes about {need:,}", advice)
    return ok("limits", text)


def check_disk(plan: Plan, is_first: bool) -> Finding:
    """Room for the checkpoints that are kept and not there yet, and for one that is being written."""
    directory = plan.run.checkpoint.directory
    if directory is None:
        return warning("disk", "checkpoint.directory is not set", "set it, or nothing will be saved")
    place = location(directory)
    if isinstance(place, RemotePath):
        return _check_store(place)
    path = nearest_folder(directory)
    if not os.access(path, os.W_OK):
        return failed("disk", f"{path} cannot be written to", "give a writable checkpoint.directory")
    keep, size = plan.run.checkpoint.keep_last, plan.checkpoint_bytes
    there = min(_num_checkpoints(place), keep)
    count, free = keep + 1 - there, shutil.disk_usage(path).free
    more = f" beside {there} that are there" if there else ""
    text = f"{count} checkpoints of {size / GIB:.2f} GiB{more}, {free / GIB:.2f} GiB free in {path}"
    if count * size > free:
        return failed("disk", text, "free space, or keep fewer (checkpoint.keep_last)")
    if is_first and (refusal := room_for(path, size)):
        return failed("disk", f"{text}, but a file of {size / GIB:.2f} GiB is refused: {refusal}",
                      "look at the quota of this user, group or project")  # fmt: skip
    return ok("disk", text)


def _num_checkpoints(directory: Path) -> int:
    if not directory.is_dir():
        return 0
    return sum((folder / "manifest.json").is_file() for folder in step_folders(directory))


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
