"""Which launcher has started this process, and as which of its ranks: the one place that knows their variables.

No torch. Where the ranks meet is found out by `parallel/launch.py`, how they share the work of preprocessing by
`data/job_rank.py`.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import LaunchError


@dataclass(frozen=True)
class Place:
    """One process among those that a launcher has started."""

    launcher: str
    """`mpirun`, `mpirun (MPICH)`, `mpirun (MVAPICH)`, `torchrun or deepspeed` (or whoever sets RANK) or `srun`."""
    rank: int
    world_size: int
    local_rank: int
    """Among those of this host; 0 if nobody has asked for it."""


# Order matters: under mpirun inside a Slurm allocation SLURM_PROCID is 0 in every rank, so MPI is asked first, as RANK
# may have been exported by hand; torchrun and the deepspeed launcher set RANK themselves inside one task per node, so
# they come before srun, and before mpirun too if they have left their own mark.
_LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("torchrun or deepspeed", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("mpirun (MVAPICH)", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    # Intel MPI's and MPICH's mpirun. srun with a PMI plugin sets PMI_RANK too, but no MPI_LOCALRANKID.
    ("mpirun (MPICH)", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)
_NEEDED = {"srun": "SLURM_STEP_ID", "mpirun (MPICH)": "MPI_LOCALRANKID"}
"""Without it the variables belong to something else: a batch script, or srun's PMI plugin."""
_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Of torchrun and of DeepSpeed's launcher, in the ranks that they start on a host."""
_INTERACTIVE_STEP = "4294967290"
"""The shell that salloc opens on a node (LaunchParameters=use_interactive_step): a step, but of nobody's ranks."""


LOCAL_SIZES = {
    "mpirun": ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "torchrun": ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    "deepspeed": ("LOCAL_SIZE", "WORLD_SIZE"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_SIZE"),
    "mpirun (MPICH)": ("MPI_LOCALNRANKS", "PMI_SIZE"),
}
"""By launcher the variables that count the ranks of this host and those of the job."""


def find_place(environ: Mapping[str, str] = os.environ, with_local_rank: bool = True) -> Place | None:
    """Rank, local rank and number of ranks from the launcher's variables; None: no launcher has started this process.

    Args:
        environ: variables of this process.
        with_local_rank: whether that is needed too, for which MPICH's variables alone are not enough.

    Raises:
        LaunchError: a variable is missing, is no number or contradicts another one.
    """
    for launcher, rank_key, local_key, size_key in _LAUNCHERS:
        needed = _NEEDED.get(launcher, rank_key)
        if rank_key not in environ or (needed not in environ and (with_local_rank or needed != local_key)):
            continue
        if launcher == "mpirun" and "RANK" in environ and any(mark in environ for mark in _MARKS):
            continue
        if launcher == "srun":
            if environ["SLURM_STEP_ID"] == _INTERACTIVE_STEP:
                continue
            size_key = _key_of_tasks(environ)
        rank, world_size = number(environ, rank_key, launcher), number(environ, size_key, launcher)
        local_rank = number(environ, local_key, launcher) if with_local_rank else 0
        if not 0 <= rank < world_size:
            raise LaunchError(f"{rank_key}={rank} is outside 0 ... {size_key}-1={world_size - 1}; check the launcher")
        if launcher == "torchrun or deepspeed":
            _refuse_exported_ranks(environ, rank, world_size)
        return Place(launcher, rank, world_size, local_rank)
    return None


def host_name(environ: Mapping[str, str] = os.environ) -> str:
    """This host's name: Slurm's if that has started this process, as its commands may not know the host's own.

    Not under mpirun: MPICH's gives the ranks of all hosts the variables of the first one.

    Args:
        environ: variables of this process.
    """
    keys = (_NEEDED.get(launcher, key) for launcher, key, *_ in _LAUNCHERS if launcher.startswith("mpirun"))
    told = None if any(key in environ for key in keys) else environ.get("SLURMD_NODENAME")
    return told or socket.gethostname()


def spans_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the ranks are known to be on several hosts."""
    if environ.get("WORLD_SIZE") == "1":  # a process without a launcher, in whatever allocation
        return False
    for local, whole in LOCAL_SIZES.values():
        if local in environ and whole in environ:
            return environ[local] != environ[whole]
    return environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")) != "1"


def number(environ: Mapping[str, str], key: str, launcher: str) -> int:
    """The integer in one of the launcher's variables.

    Raises:
        LaunchError: the variable is not set, or is not an integer.
    """
    value = environ.get(key)
    if value is None:
        raise LaunchError(
            f"{key} is not set although {launcher} seems to have started this process; pass it to each rank"
        )
    try:
        return int(value)
    except ValueError:
        raise LaunchError(f"{key}={value!r} is not an integer; {launcher} should set it to a number") from None


def _key_of_tasks(environ: Mapping[str, str]) -> str:
    """The variable that counts the tasks of srun's step; SLURM_NTASKS may be that of the allocation.

    In a heterogeneous job it is the other way round: SLURM_STEP_NUM_TASKS counts those of one component.
    """
    is_told = "SLURM_STEP_NUM_TASKS" in environ and "SLURM_HET_SIZE" not in environ
    return "SLURM_STEP_NUM_TASKS" if is_told else "SLURM_NTASKS"


def _refuse_exported_ranks(environ: Mapping[str, str], rank: int, world_size: int) -> None:
    """RANK exported in a batch script is the same in all tasks of srun: each would take itself for that rank."""
    key = _key_of_tasks(environ)
    is_task_per_rank = environ.get(key) == str(world_size) and world_size > 1
    is_step = environ.get("SLURM_STEP_ID", _INTERACTIVE_STEP) != _INTERACTIVE_STEP
    if "TORCHELASTIC_RUN_ID" in environ or not is_step or not is_task_per_rank:
        return
    task = environ.get("SLURM_PROCID")
    if task != str(rank):
        raise LaunchError(
            f"RANK={rank} contradicts SLURM_PROCID={task}, although srun has started one task per rank "
            f"({key}={world_size}); do not export RANK, LOCAL_RANK and WORLD_SIZE in the batch file: they are "
            "found out"
        )
