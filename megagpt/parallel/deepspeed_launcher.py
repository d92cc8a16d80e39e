"""DeepSpeed's launcher: those of its defects that a rank can see, mended where that is possible, else told (no torch).

Seen in DeepSpeed 0.19. What the rank never lives to see is told in the batch files and in README.md:

1. `--launcher slurm` sets neither RANK nor MASTER_ADDR: ranks are found out from srun's variables, see `launch.py`.
2. It ignores the slots of the hostfile, so that hosts may get uneven numbers of ranks: told here.
3. `--launcher slurm` ignores `--module`, and `--launcher mpich` cannot start what it names: give `megagpt/train.py`.
4. Values of DS_ENV_FILE with spaces or commas reach ranks of `slurm` and `openmpi` damaged: mended here.
5. With one remote host in the hostfile or in `--include` it starts the ranks on the host where it was called: refused
   here.
6. `--launcher_args "-N2"` is not understood: write `--launcher_args="-N2"`.
7. pdsh waits for ever for a host that has lost its power, unless ssh asks whether it is alive: told here.
8. Stopped by SIGTERM or Ctrl-C, it ends all of the user's launchers on its hosts, other jobs' too: told here.
"""

import base64
import binascii
import contextlib
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from megagpt.errors import LaunchError
from megagpt.parallel.interface import addresses
from megagpt.parallel.launch import Launch, detect_launch

_LAUNCH = "deepspeed.launcher.launch"
_PLAIN = re.compile(r"[\w@%+=:,./-]*")


@dataclass(frozen=True)
class LauncherProcess:
    """One of DeepSpeed's launchers, which starts the ranks of one host."""

    world: dict[str, list[int]]
    """Hosts, in order, with the numbers of their slots."""
    node_rank: int | None
    """Which of them it believes to be on; None: the ranks were to start where it was called."""
    job: tuple[str, ...]
    """What is the same in all launchers of a job, and differs between jobs."""


def parse_launcher(words: Iterable[str]) -> LauncherProcess | None:
    """Understand a command line; None if it is not that of a launcher."""
    given, world = list(words), None
    if _LAUNCH not in given and not any(word.endswith("deepspeed/launcher/launch.py") for word in given):
        return None
    options = dict(word.partition("=")[::2] for word in given if word.startswith("--"))
    with contextlib.suppress(ValueError, binascii.Error):
        world = json.loads(base64.urlsafe_b64decode(options.get("--world_info", "")))
    if not isinstance(world, dict) or not world:
        return None
    node_rank = options.get("--node_rank", "")
    job = (options.get("--world_info", ""), options.get("--master_addr", ""), options.get("--master_port", ""))
    return LauncherProcess(world, int(node_rank) if node_rank.isdigit() else None, job)


def find_launch() -> Launch:
    """Which rank this process is, as `detect_launch`; what its launcher gives reason to say goes to stderr.

    Raises:
        LaunchError: as `detect_launch`, or the ranks run on another host than was asked for.
    """
    launch = detect_launch()
    for remark in inspect_launcher(launch):
        print(f"warning: {remark}", file=sys.stderr, flush=True)
    return launch


def inspect_launcher(launch: Launch, environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Look at who has started this rank; damaged variables are mended.

    Returns:
        What the user should know, one sentence each; on some ranks only, so that it is said once.

    Raises:
        LaunchError: the ranks run on another host than was asked for.
    """
    remarks = mend_variables(launch, environ)
    remarks += uneven_tasks(launch, environ)
    if launch.launcher != "deepspeed" or launch.local_rank != 0:
        return remarks
    own = parse_launcher(_words(psutil.Process().parent()))
    if own is None:
        return remarks
    require_right_host(own)
    if launch.rank == 0 and len(own.world) > 1:
        remarks += pdsh_without_questions(own, _processes())
    return remarks + launchers_of_other_jobs(own, _processes())


def require_right_host(own: LauncherProcess) -> None:
    """See that a launcher that was called for a single host runs on it.

    Raises:
        LaunchError: it does not.
    """
    (*others, host) = own.world
    if others or own.node_rank is not None or _is_here(host):
        return
    raise LaunchError(
        f"the only host asked for is {host} (hostfile, --include, --num_nodes), but DeepSpeed's launcher has started "
        f"the ranks on {socket.gethostname()}, where it was called: it does so with a single host; add --force_multi"
    )


def _is_here(host: str) -> bool:
    if host.partition(".")[0] in ("localhost", socket.gethostname().partition(".")[0]):
        return True
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return True  # a name that only ssh knows; nothing can be said
    return bool(found & set(addresses().values())) or any(ipaddress.ip_address(ip).is_loopback for ip in found)


def mend_variables(launch: Launch, environ: MutableMapping[str, str]) -> list[str]:
    """Give variables of DS_ENV_FILE their values back which the launcher has damaged on their way.

    Its `openmpi` launcher puts values with other characters than [A-Za-z0-9_@%+=:,./-] in quotes that nobody takes off;
    its `slurm` launcher does too, and srun ends them at the first comma.
    """
    if launch.launcher not in ("srun", "mpirun", "mpirun (MPICH)"):
        return []
    remarks = []
    for path, name, value in _given_variables(environ):
        quoted = value if _PLAIN.fullmatch(value) else f'"{value}"'
        found = environ.get(name)
        if found is None or found == value or found not in (quoted, quoted.split(",")[0]):
            continue
        environ[name] = value
        if launch.rank == 0:
            remarks.append(
                f"DeepSpeed's launcher has damaged {name} of {path} ({found} instead of {value}): the ranks use what "
                f"the file says; to have it right from the start, export {name} before `deepspeed`"
            )
    return remarks


def _given_variables(environ: Mapping[str, str]) -> Iterator[tuple[Path, str, str]]:
    """File, name and value, from where DeepSpeed looks for them; a later one wins."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in (Path(environ.get("HOME", "/")), Path(".")):
        path = folder / name
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in path.read_text().splitlines():
                key, equals, value = line.partition("=")
                if equals:
                    yield path, key.strip(), value.strip()


def uneven_tasks(launch: Launch, environ: Mapping[str, str]) -> list[str]:
    """Whether srun has put more ranks on some hosts than on others: `2(x3),1`."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = {int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", re.sub(r"\(x\d+\)", "", text))}
    if launch.launcher != "srun" or launch.rank != 0 or len(counts) < 2:
        return []
    return [
        f"hosts have {text} ranks, so that groups of ranks lie across hosts: srun, and DeepSpeed's slurm launcher, "
        'which ignores slots in the hostfile, need --ntasks-per-node=N (--launcher_args="--ntasks-per-node=N")'
    ]


def pdsh_without_questions(own: LauncherProcess, processes: Iterable[psutil.Process]) -> list[str]:
    """Whether the job's pdsh, if it runs on this host, would wait for ever for a host that is gone."""
    for process in processes:
        words = _words(process)
        if not words or Path(words[0]).name != "pdsh" or f"--world_info={own.job[0]}" not in " ".join(words):
            continue
        with contextlib.suppress(psutil.Error):
            given = process.environ().get("PDSH_SSH_ARGS_APPEND", "")
            if "ServerAliveInterval" not in given and not _ssh_asks(next(iter(own.world))):
                return [
                    "pdsh will wait for ever for a host that loses its power, and the job with it; export "
                    'PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=5 -o ServerAliveCountMax=2" before `deepspeed`'
                ]
    return []


def _ssh_asks(host: str) -> bool:
    """Whether ssh's own configuration has it ask whether the host is alive."""
    try:
        told = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return True  # nothing can be said
    return re.search(r"^serveraliveinterval [1-9]", told, re.MULTILINE | re.IGNORECASE) is not None


def launchers_of_other_jobs(own: LauncherProcess, processes: Iterable[psutil.Process]) -> list[str]:
    """Whether there are launchers on this host that would be ended with this job's, or this job's with them."""
    if own.node_rank is None:  # not started by pdsh, which is what ends them
        return []
    found = (parse_launcher(_words(process)) for process in processes)
    others = {other.job for other in found if other is not None and other.job != own.job}
    if not others:
        return []
    ports = ", ".join(sorted(port or "29500" for _, _, port in others))
    return [
        f"{socket.gethostname()} has other jobs of DeepSpeed's launcher (master port {ports}): stopping one of them by "
        "Ctrl-C or SIGTERM may end them all, as with pdsh it ends every launcher of the user; give each job its own "
        "hosts, or start the ranks by srun or torchrun"
    ]


def _processes() -> list[psutil.Process]:
    """Those of this user."""
    user, found = os.getuid(), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real == user:
                found.append(process)
    return found


def _words(process: psutil.Process | None) -> list[str]:
    try:
        return [] if process is None else process.cmdline()
    except psutil.Error:  # it has ended, or is not ours to look at
        return []
