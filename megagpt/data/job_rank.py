"""Which of several processes of one preprocessing job this is, whoever started it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import LaunchError
from megagpt.launchers import find_place


@dataclass(frozen=True)
class JobRank:
    """One of `world_size` processes, counted from 0."""

    rank: int
    world_size: int


ALONE = JobRank(0, 1)


def find_job_rank(
    rank: int | None = None, world_size: int | None = None, environ: Mapping[str, str] = os.environ
) -> JobRank:
    """Rank and number of ranks as given, else as Slurm (array tasks and steps), MPI or torchrun have set them; else one
    alone.

    Raises:
        LaunchError: only one of the two is given, they contradict each other, or a variable is no number.
    """
    if (rank is None) != (world_size is None):
        raise LaunchError("--rank and --world-size belong together; give both or none")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise LaunchError(
                f"--rank={rank} is outside 0 ... --world-size - 1 = {world_size - 1}; give each rank once"
            )
        return JobRank(rank, world_size)
    # Inside an array task or allocation the innermost launcher counts.
    place = find_place(environ, with_local_rank=False)
    inner = ALONE if place is None else JobRank(place.rank, place.world_size)
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return inner
    count = _number(environ, "SLURM_ARRAY_TASK_COUNT")
    step = _number(environ, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environ else 1
    task = (_number(environ, "SLURM_ARRAY_TASK_ID") - _number(environ, "SLURM_ARRAY_TASK_MIN")) // max(step, 1)
    if not 0 <= task < count:
        raise LaunchError(
            f"SLURM_ARRAY_TASK_ID={environ['SLURM_ARRAY_TASK_ID']} is not one of {count} tasks in even steps; submit"
            " with --array=0-N, or give --rank and --world-size"
        )
    return JobRank(task * inner.world_size + inner.rank, count * inner.world_size)


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except (KeyError, ValueError):
        found = environ.get(key)
        raise LaunchError(f"{key}={found} is no number; check the launcher or give --rank and --world-size") from None
