"""Where the ranks of a job meet: MASTER_ADDR and MASTER_PORT, or what takes their place if nobody has set them.

Every rank works both out by itself, from variables that are the same in all ranks, and all must come to one result:
no rank can ask another one before they have met.
"""

import contextlib
import hashlib
import os
import re
import socket
from collections.abc import Mapping

from megagpt.errors import LaunchError
from megagpt.launchers import LOCAL_SIZES, number
from megagpt.parallel.interface import addresses, outer_address

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
# Below 32768, where Linux begins to hand out ports for outgoing connections.
_FIRST_PORT, _NUM_PORTS = 20000, 10000
_HOSTLISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def find_master(environ: Mapping[str, str], launcher: str, world_size: int) -> tuple[str, int]:
    """Address and port at which rank 0 listens.

    Args:
        environ: variables of this rank.
        launcher: who started it, as in `Launch.launcher`.
        world_size: ranks of the job.

    Raises:
        LaunchError: the job spans hosts and nothing tells where rank 0 runs, or a variable is malformed.
    """
    address = environ.get("MASTER_ADDR") or _address(environ, launcher, world_size)
    if "MASTER_PORT" in environ:
        return address, number(environ, "MASTER_PORT", launcher)
    return address, _port(environ, launcher)


def expand_hostlist(text: str) -> list[str]:
    """The hosts of a Slurm host list, in order: `gpu[08-10,12],login` is gpu08, gpu09, gpu10, gpu12, login.

    Raises:
        LaunchError: brackets are unbalanced or hold something else than numbers and rising ranges.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", text):  # commas inside brackets do not separate items
        hosts += _expand_item(item.strip(), text)
    return hosts


def _expand_item(item: str, text: str) -> list[str]:
    prefix, bracket, rest = item.partition("[")
    numbers, closing, suffix = rest.partition("]")
    if not bracket and "]" not in item:
        return [item]
    if not bracket or not closing:
        raise LaunchError(f"the host list {text!r} has unbalanced brackets; set MASTER_ADDR to the host of rank 0")
    hosts = []
    for part in numbers.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise LaunchError(
                f"the host list {text!r} has {part!r} in brackets, which is no number or rising range like 08-12;"
                " set MASTER_ADDR to the host of rank 0"
            )
        middles = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        # A second pair of brackets counts faster, as in rack[1-2]node[1-4].
        hosts += [prefix + middle + end for middle in middles for end in _expand_item(suffix, text)]
    return hosts


def _address(environ: Mapping[str, str], launcher: str, world_size: int) -> str:
    if world_size == 1:
        return LOOPBACK
    if launcher.startswith("mpirun"):
        local, whole = LOCAL_SIZES[launcher]
        if environ.get(local, "") == environ.get(whole):
            return LOOPBACK
        if environ.get("SLURM_JOB_NODELIST"):  # mpirun fills the hosts of an allocation in their order
            return expand_hostlist(environ["SLURM_JOB_NODELIST"])[0]
        if environ is os.environ and (told := _told_by_mpi()) is not None:
            return told
        advice = "install mpi4py, or start it as `mpirun -x MASTER_ADDR=HOST ...` with the first host's name"
    elif launcher == "srun":
        key = next((key for key in _HOSTLISTS if environ.get(key)), None)
        hosts = expand_hostlist(environ[key]) if key is not None else []
        if len(hosts) == 1 or environ.get("SLURM_NNODES") == "1":
            return LOOPBACK
        if hosts:
            return hosts[0]  # srun puts rank 0 on the first node of the step
        advice = "export it in the batch script: MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
    else:
        advice = "set it to the host of rank 0"
    raise LaunchError(f"MASTER_ADDR is not set, and {launcher} does not tell on which host rank 0 runs; {advice}")


def _told_by_mpi() -> str | None:
    """Rank 0's address, which it tells the others through MPI; None without mpi4py. Collective."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False  # MPI is needed for this question alone
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # the latter: there is no MPI library
        return None
    MPI.Init()
    told = MPI.COMM_WORLD.bcast(_own_address() if MPI.COMM_WORLD.Get_rank() == 0 else None)
    MPI.Finalize()
    return str(told)


def _own_address() -> str:
    """That which this host's name stands for, unless only this host knows it by that; else one of an interface."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    others = (address for address in addresses().values() if not address.startswith("127."))
    return outer_address() or next(others, LOOPBACK)


def _port(environ: Mapping[str, str], launcher: str) -> int:
    """A port per job step, so that jobs which share a host do not meet each other."""
    if launcher == "mpirun" and "PMIX_NAMESPACE" in environ:  # Open MPI's name of this mpirun
        digest = hashlib.sha256(environ["PMIX_NAMESPACE"].encode()).digest()
        return _FIRST_PORT + int.from_bytes(digest[:4], "little") % _NUM_PORTS
    if "SLURM_JOB_ID" in environ:
        step = number(environ, "SLURM_STEP_ID", launcher) if "SLURM_STEP_ID" in environ else 0
        # The factor keeps step 1 of a job away from step 0 of the job submitted next.
        return _FIRST_PORT + (number(environ, "SLURM_JOB_ID", launcher) + 2011 * step) % _NUM_PORTS
    return DEFAULT_PORT
