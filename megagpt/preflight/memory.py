"""The Plan's estimate against the memory that is free: of GPUs, and of the host."""

from typing import NamedTuple

import psutil
import torch

from megagpt.cgroup import tightest_room
from megagpt.plan import Plan
from megagpt.plan.fitting import GIB, less_on_the_host, offloaded
from megagpt.preflight.findings import Finding, failed, ok, warning, worst

MEMORY_SHARE = 0.9
"""Of free memory that the estimate may take: buckets and the framework come on top."""
_ADVICE = "smaller micro-batches, recomputation or more ranks: see tools/plan.py"
_TIGHT = "this may just not fit: buckets and the framework come on top"


class _Free(NamedTuple):
    """Memory of the host that a run may have."""

    bytes: int
    reason: str
    """Why it is no more than that, if not for the host itself."""
    advice: str


def check_memory(plan: Plan, ranks_on_host: int | None) -> Finding:
    """The Plan's estimate against what is free: per rank, and on hosts with GPUs also of all ranks in host memory.

    Args:
        plan: of the run.
        ranks_on_host: how many of its ranks this host has; None: not known.
    """
    if not torch.cuda.is_available():
        return _check_cpus(plan, ranks_on_host)
    found = [_check_gpus(plan)]
    if offloaded(plan) + plan.save_copy_bytes:
        found.append(_check_host(plan, ranks_on_host or min(plan.world_size, torch.cuda.device_count())))
    text = "; ".join(finding.text for finding in found)
    advice = "; ".join(finding.advice for finding in found if finding.advice)
    return Finding(check="memory", status=worst(found), text=text, advice=advice)


def _check_gpus(plan: Plan) -> Finding:
    need, advice = plan.memory.total, _ADVICE
    try:
        index, (free, total) = _fullest_gpu()
    except RuntimeError as error:
        return failed("memory", str(error).splitlines()[0], "reset the GPU or take the node out of service")
    text = f"{need / GIB:.2f} GiB estimated per rank, {free / GIB:.2f} of {total / GIB:.2f} GiB are free on GPU {index}"
    if free < need <= total:
        advice = "nvidia-smi names the process that has the rest: end it"
    return _judged(need, free, text, advice)


def _check_host(plan: Plan, ranks: int) -> Finding:
    """Host memory beside GPUs: what all ranks of this host take of it."""
    need, free = ranks * (offloaded(plan) + plan.save_copy_bytes), _free_memory()
    text = (
        f"{need / GIB:.2f} GiB of host memory for {ranks} ranks, each with {_parts(plan)}, "
        f"{free.bytes / GIB:.2f} GiB are free{free.reason}"
    )
    return _judged(need, free.bytes, text, free.advice + less_on_the_host(plan))


def _check_cpus(plan: Plan, ranks_on_host: int | None) -> Finding:
    """Everything is in one memory."""
    need = max(estimate.total + estimate.host for estimate in plan.memory_per_stage) + plan.save_copy_bytes
    free, ranks, advice = _free_memory(), ranks_on_host or plan.world_size, _ADVICE
    text = f"{need / GIB:.2f} GiB estimated per rank, "
    if parts := _parts(plan):
        text = f"{need / GIB:.2f} GiB estimated per rank with {parts}, "
        advice += f"; or {less_on_the_host(plan)}"
    share = free.bytes // ranks
    if ranks_on_host is None and share < need <= free.bytes:
        text += (
            f"{free.bytes / GIB:.2f} GiB are free{free.reason}: {free.bytes // need} of {ranks} ranks fit on this host"
        )
        return warning("memory", text, "start the run on several hosts")
    text += f"{share / GIB:.2f} GiB of free memory per rank{free.reason}"
    if ranks_on_host is None and ranks > 1:
        text += f" if all {ranks} run on this host"
    return _judged(need, share, text, free.advice + advice)


def _judged(need: int, free: int, text: str, advice: str) -> Finding:
    if need > free:
        return failed("memory", text, advice)
    return warning("memory", text, _TIGHT) if need > MEMORY_SHARE * free else ok("memory", text)


def _parts(plan: Plan) -> str:
    """What a rank has in host memory though it is not at work there."""
    parts = {"for ZeRO's offload": offloaded(plan), "for the copy of a save": plan.save_copy_bytes}
    return " and ".join(f"{size / GIB:.2f} {what}" for what, size in parts.items() if size)


def _free_memory() -> _Free:
    """What the host has, or less where a control group limits this job."""
    available, room = psutil.virtual_memory().available, tightest_room()
    if room is None or room.free >= available:
        return _Free(available, "", "")
    return _Free(
        room.free, f" under the limit of {room.group}", "allow more (Slurm: --mem; a container: its limit), or "
    )


def _fullest_gpu() -> tuple[int, tuple[int, int]]:
    """The GPU with the least free memory; its free bytes, and all that it has."""
    found = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    return min(enumerate(found), key=lambda entry: entry[1][0])
