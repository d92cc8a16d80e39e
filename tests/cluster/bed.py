"""A cluster on this machine: real Slurm, munge, sshd, pdsh and Open MPI; each host is a set of namespaces.

Several can be up at a time: all that they share with each other and with the machine is the folder that is given.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "cluster.sh"
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "mpirun": "openmpi-bin",
    "ip": "iproute2",
    "nft": "nftables",
}
"""Program and the Debian package that brings it; .ci/run installs them."""
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"


def obstacle() -> str | None:
    """Why there can be no cluster on this machine."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=PATH) is None]
    if missing:
        return f"no cluster on this machine: apt-get install {' '.join(missing)}"
    if os.geteuid() != 0:
        return "no cluster on this machine: its hosts are namespaces, which only root can make"
    made = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"], check=False)
    return "no cluster on this machine: namespaces cannot be made here" if made.returncode else None


class Cluster:
    """The running cluster.

    Args:
        folder: of its state; what jobs write goes beside it.
        num_nodes: besides the head.
    """

    def __init__(self, folder: Path, num_nodes: int = 2):
        self.folder, self.root = folder, ROOT
        self.disk = folder / "disk"
        """A small file system that all hosts share, and only they see."""
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        shared = {path for path in (ROOT, Path(sys.prefix), folder.parent) if path.is_relative_to("/tmp")}
        self.environ = {
            **os.environ,
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TC_DIR": str(folder),
            "TC_SHARE": " ".join(map(str, shared)),
            "TC_NODES": " ".join(self.nodes),
            "TC_TTL": "3600",
            "TC_CPUS": "8",
            "TC_SLURMD_TIMEOUT": "10",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def control(self, *words: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Call cluster.sh, in the repository's folder."""
        return subprocess.run(
            [SCRIPT, *words], cwd=ROOT, env=self.environ, capture_output=True, text=True, timeout=timeout, check=False
        )

    def run(self, host: str, *command: str, timeout: float = 60.0) -> str:
        """What a command prints on a host."""
        result = self.control("run", host, *command, timeout=timeout)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def is_up(self, host: str) -> bool:
        """Whether a host has power."""
        return self.control("run", host, "true").returncode == 0

    def is_idle(self) -> bool:
        """Whether all nodes wait for work."""
        idle = self.run("head", "sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
        return set(idle) == set(self.nodes)

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        """Wait for all nodes; it must not take longer."""
        deadline = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < deadline, self.run("head", "sinfo", "-N", "-l")
            time.sleep(0.5)

    def submit(self, *words: str) -> str:
        """Submit a job; its number."""
        return self.run("head", "sbatch", "--parsable", *words).strip()

    def state(self, job: str) -> str:
        """The state of a job in Slurm's word."""
        return self._field(job, "JobState")

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        return int(self._field(job, "Restarts"))

    def _field(self, job: str, name: str) -> str:
        return re.findall(rf"\b{name}=(\w+)", self.run("head", "scontrol", "show", "job", job))[0]

    def hurry(self, job: str) -> None:
        """Have a job that is queued again start now, not in two minutes: once its old steps are over everywhere and
        Slurm counts no node as busy, which is what it leaves the time for."""
        is_over = all(self.control("run", host, "pgrep", "slurmstepd").returncode for host in self.nodes)
        busy = self.run("head", "sinfo", "-h", "-N", "-t", "allocated,mixed,completing", "-o", "%N").split()
        if is_over and not busy:
            self.control("run", "head", "scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1.0)

    def wait_for(self, job: str, states: tuple[str, ...], seconds: float) -> str:
        """Wait until a job is in one of some states; it must not take longer."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is still {state}: {self.output(job)}"
            if state == "PENDING":
                self.hurry(job)
            time.sleep(0.5)
        return state

    def output(self, job: str) -> str:
        """What a job has printed so far."""
        path = self.folder.parent / f"job-{job}.out"
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def running_cluster(num_nodes: int = 2) -> Iterator[Cluster]:
    """A head and some nodes, for as long as the block runs; their files are in a folder of its own in /tmp.

    Args:
        num_nodes: besides the head.
    """
    base = Path(tempfile.mkdtemp(prefix="megagpt-cluster-"))
    base.chmod(0o755)  # munged wants its folder, and all above it, to be open to others
    cluster = Cluster(base / "state", num_nodes)
    cluster.folder.mkdir()
    try:
        started = cluster.control("up", timeout=120)
        assert started.returncode == 0, started.stderr
        yield cluster
    finally:
        cluster.control("down")
        shutil.rmtree(base, ignore_errors=True)
