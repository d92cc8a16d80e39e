"""What to say when a rank has run out of memory: of its GPU or of its host, and what would fit."""

import os
import re
from typing import Literal

import psutil
import torch

from megagpt.cgroup import smallest_limit
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan, describe
from megagpt.plan.fitting import GIB, less_on_the_host, nearest_that_fits

Memory = Literal["gpu", "host"]
_OUT_OF_GPU_MEMORY = re.compile(
    "CUDA out of memory|CUDA error: out of memory|Cuda failure.*'out of memory'|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    "|cudaErrorMemoryAllocation"
)
_OUT_OF_HOST_MEMORY = re.compile("can't allocate memory|Cannot allocate memory|bad_alloc")


def exhausted_memory(error: Exception) -> Memory | None:
    """Which memory an error of torch, of a CUDA library or of Python says is full; None if it is about something else.

    Args:
        error: out of a run.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_GPU_MEMORY.search(text):
        return "gpu"
    return "host" if isinstance(error, MemoryError) or _OUT_OF_HOST_MEMORY.search(text) else None


def shortage(memory: Memory, plan: Plan, ranks: Ranks, reason: str) -> str:
    """What has run out and where, in one line.

    Args:
        memory: that is full.
        plan: of the run.
        ranks: this rank.
        reason: the library's words.
    """
    if memory == "gpu":
        where = f"its GPU has {_capacity(memory, ranks) / GIB:.1f} GiB"
    else:
        where = f"its host has {_capacity(memory, ranks) / GIB:.1f} GiB for each of its ranks"
    # An error of CUDA would speak against the host, which has no part in it.
    first = (reason.strip().splitlines() or ["no memory left"])[0].replace("CUDA error: ", "")
    return f"out of memory in stage {ranks.pipeline_rank} of {plan.pipeline_parallel_size}; {where} ({first})"


def advice(memory: Memory, plan: Plan, ranks: Ranks) -> str:
    """The Plan's table and what would fit; takes seconds.

    Args:
        memory: that is full.
        plan: of the run.
        ranks: this rank.
    """
    table = describe(plan).partition("estimated memory")
    rows = table[2].split("\n\n")[0].splitlines()[: plan.pipeline_parallel_size + 2]
    return "\n".join([table[1] + "\n".join(rows), _change(memory, plan, ranks)])


def _change(memory: Memory, plan: Plan, ranks: Ranks) -> str:
    if memory == "host" and ranks.device.type == "cuda":
        return less_on_the_host(plan)
    # It was too much, whatever had been estimated: what is advised must be well below.
    return nearest_that_fits(plan, min(int(0.85 * _capacity(memory, ranks)), int(0.8 * plan.memory.total)))


def _capacity(memory: Memory, ranks: Ranks) -> int:
    """Bytes that each rank of this host has."""
    if memory == "gpu":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or ranks.world_size
    total = psutil.virtual_memory().total
    return min(total, smallest_limit() or total) // on_host
