"""How many files and sockets a rank may have open, and how many it will (no torch)."""

import contextlib
import resource

from megagpt.plan import Plan

_ENOUGH = 1 << 20
"""Of programs that close all files there might be, some take minutes with a higher limit."""
_OF_ITS_OWN = 256
"""Libraries, logs, checkpoints, and groups of few ranks."""
_WORLD_MESHES = 3
"""Groups of all ranks on the hosts' network: votes on stopping and on saves, and the exchange of savers."""
_REPLICA_MESHES = 7
"""Groups of data-parallel ranks there: Megatron-Core's, and those that hand on samples."""
_WORLD_MESHES_WITHOUT_GPUS, _REPLICA_MESHES_WITHOUT_GPUS = 7, 10
"""On CPUs all groups are on the hosts' network."""
_PER_MESH = 3
_PER_DATASET = 4


def raise_limit() -> None:
    """Have this process, and those that it starts, open as many files as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < most_files():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_files(), hard))


def most_files() -> int:
    """What `raise_limit` comes to."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)


def needed_files(plan: Plan, on_gpus: bool) -> int:
    """About how many a rank has open: a gloo group has a socket to each of its other members."""
    worlds = _WORLD_MESHES if on_gpus else _WORLD_MESHES_WITHOUT_GPUS
    replicas = _REPLICA_MESHES if on_gpus else _REPLICA_MESHES_WITHOUT_GPUS
    size = plan.data_parallel_size * plan.context_parallel_size
    data = plan.run.data
    datasets = len(data.mixed) + len(data.validation) + len(data.test)
    return (
        _OF_ITS_OWN
        + worlds * (plan.world_size + _PER_MESH)
        + replicas * (size + _PER_MESH)
        + _PER_DATASET * datasets
    )  # fmt: skip
