"""Find out which rank this process is, whoever started it (no torch here, so that it can run before heavy imports)."""

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megagpt.launchers import find_place
from megagpt.parallel.master import LOOPBACK, find_master

OPEN_MPI_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"


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
        if OPEN_MPI_LOCAL_RANK in environ:  # DeepSpeed compares both; torchrun may have started the ranks inside a task
            environ[OPEN_MPI_LOCAL_RANK] = str(self.local_rank)


def detect_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read rank, local rank and world size from the launcher's variables.

    MASTER_ADDR and MASTER_PORT may be left out under srun, and under mpirun on a single host: see `find_master`.

    Raises:
        LaunchError: a variable is missing, is no number, contradicts another one, or no master address is known.
    """
    place = find_place(environ)
    if place is None:
        return Launch(0, 0, 1, LOOPBACK, free_port(), "single process")
    master = find_master(environ, place.launcher, place.world_size)
    return Launch(place.rank, place.local_rank, place.world_size, *master, _by_name(place.launcher, environ))


def _by_name(launcher: str, environ: Mapping[str, str]) -> str:
    """Which of those that set RANK it was, if that can be told."""
    if launcher != "torchrun or deepspeed":
        return launcher
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environ else launcher


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]
