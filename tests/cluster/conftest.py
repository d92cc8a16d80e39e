"""A cluster of two nodes on this machine: real Slurm, munge, sshd, pdsh and Open MPI; each host is a set of namespaces.

Where it cannot be had, these tests are skipped, with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
        folder: of its state; also what jobs write goes below it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        shared = {path for path in (ROOT, Path(sys.prefix), folder.parent) if path.is_relative_to("/tmp")}
        self.environ = {
            **os.environ,
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TC_DIR": str(folder),
            "TC_SHARE": " ".join(map(str, shared)),
            "TC_TTL": "1800",
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

    def submit(self, *words: str) -> str:
        """Submit a job; its number."""
        return self.run("head", "sbatch", "--parsable", *words).strip()

    def state(self, job: str) -> str:
        """The state of a job in Slurm's word."""
        return re.findall(r"JobState=(\w+)", self.run("head", "scontrol", "show", "job", job))[0]

    def wait_for(self, job: str, states: tuple[str, ...], seconds: float) -> str:
        """Wait until a job is in one of some states; it must not take longer."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is still {state}: {self.output(job)}"
            if state == "PENDING":  # Slurm would wait two minutes before it starts a job again
                self.control("run", "head", "scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.5)
        return state

    def output(self, job: str) -> str:
        """What a job has printed so far."""
        path = self.folder.parent / f"job-{job}.out"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes and a head, for all tests of this session."""
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    base = Path(tempfile.mkdtemp(prefix="megagpt-cluster-"))
    base.chmod(0o755)  # munged wants its folder, and all above it, to be open to others; pytest's are not
    cluster = Cluster(base / "state")
    cluster.folder.mkdir()
    started = cluster.control("up", timeout=120)
    try:
        assert started.returncode == 0, started.stderr
        yield cluster
    finally:
        cluster.control("down")
        shutil.rmtree(base, ignore_errors=True)
