"""Find out which rank this process is, whoever started it (no torch here, so that it can run before heavy imports)."""

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megagpt.errors import LaunchError
from megagpt.parallel.master import LOOPBACK, find_master, number


@dataclass(frozen=True)
class Launch:
    """What the launcher said about this process."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    launcher: str
    """Who started the process: `mpirun`, `mpirun (MPICH)`, `mpirun (MVAPICH)`, `torchrun`, `deepspeed`, `torchrun or
    deepspeed` (or whoever sets RANK), `srun` or `single process`."""

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set the variables that torch.distributed and DeepSpeed read."""
        environ["RANK"] = str(self.rank)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["MASTER_ADDR"] = self.master_addr
        environ["MASTER_PORT"] = str(self.master_port)


# Order matters: under mpirun inside a Slurm allocation SLURM_PROCID is 0 in every rank, so MPI is asked first;
# torchrun and the deepspeed launcher set RANK themselves inside one Slurm task per node, so they come before srun.
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


def detect_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read rank, local rank and world size from the launcher's variables.

    MASTER_ADDR and MASTER_PORT may be left out under srun, and under mpirun on a single host: see `find_master`.

    Raises:
        LaunchError: a variable is missing, is no number, contradicts another one, or no master address is known.
    """
    for launcher, rank_key, local_key, size_key in _LAUNCHERS:
        if rank_key not in environ or _NEEDED.get(launcher, rank_key) not in environ:
            continue
        rank, world_size = number(environ, rank_key, launcher), number(environ, size_key, launcher)
        local_rank = number(environ, local_key, launcher)
        if not 0 <= rank < world_size:
            raise LaunchError(f"{rank_key}={rank} is outside 0 ... {size_key}-1={world_size - 1}; check the launcher")
        if launcher == "torchrun or deepspeed":
            _refuse_exported_ranks(environ, rank, world_size)
        master = find_master(environ, launcher, world_size)
        return Launch(rank, local_rank, world_size, *master, _by_name(launcher, environ))
    return Launch(0, 0, 1, LOOPBACK, free_port(), "single process")


def _by_name(launcher: str, environ: Mapping[str, str]) -> str:
    """Which of those that set RANK it was, if that can be told."""
    if launcher != "torchrun or deepspeed":
        return launcher
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environ else launcher


def _refuse_exported_ranks(environ: Mapping[str, str], rank: int, world_size: int) -> None:
    """RANK exported in a batch script is the same in all tasks of srun: each would take itself for that rank."""
    is_task_per_rank = environ.get("SLURM_NTASKS") == str(world_size) and world_size > 1
    if "TORCHELASTIC_RUN_ID" in environ or "SLURM_STEP_ID" not in environ or not is_task_per_rank:
        return
    task = environ.get("SLURM_PROCID")
    if task != str(rank):
        raise LaunchError(
            f"RANK={rank} contradicts SLURM_PROCID={task}, although srun has started one task per rank "
            f"(SLURM_NTASKS={world_size}); do not export RANK, LOCAL_RANK and WORLD_SIZE in the batch file: they are "
            "found out"
        )


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]
