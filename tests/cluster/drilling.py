"""A run on the cluster that meets a fault, time and again, and what has to be true of it in the end."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bed import Cluster
from small_runs import Run, srun_job

STEPS_BETWEEN = 6
"""More than from one checkpoint to the next, so that a restart always has made progress."""
START_SECONDS = 300.0
ENDED_WITHIN = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and what has to follow.

    `inject` brings it about, `mend` takes it back once its words are in the output (a pattern; empty: none are
    expected). Then the run has to go on by itself (`again`), go on without having ended (`on`), end and go on once it
    is submitted anew (`by hand`), or end for good (`given up`).
    """

    inject: Callable[["Drill"], None]
    words: str
    then: Literal["again", "on", "by hand", "given up"] = "again"
    mend: Callable[["Drill"], None] = lambda drill: None
    plant: str = ""
    """For `planted/sitecustomize.py`."""
    options: tuple[str, ...] = ()
    """For sbatch."""
    num_nodes: int = 2
    steps: int = 8
    """That a run needs for it."""
    patience: float = 60.0
    """Seconds from the fault to its words."""
    pace: float = 0.4
    """Seconds that a step takes at least."""
    hurries: bool = True
    """Whether a job that is queued again is started at once, not after the two minutes that Slurm leaves itself: where
    a node was out of reach, the step that was lost there would be counted as running, or end the new one."""
    once: bool = False
    """Whether a run can meet it but once."""
    sections: tuple[tuple[str, dict], ...] = ()
    """Of the run config."""


@dataclass(frozen=True)
class Met:
    """How one fault went."""

    said_after: float
    """Seconds from the fault to its words."""
    gone_after: float
    """Seconds from the words until the job had ended or been queued again."""
    line: str
    """What was said."""


class Drill:
    """One run and its job.

    Args:
        cluster: a healthy one.
        run: what to train.
        first: the first fault that it will meet; what it plants, its pace and its options for sbatch are the run's.
    """

    def __init__(self, cluster: Cluster, run: Run, first: Fault):
        self.cluster, self.run, self._first = cluster, run, first
        self.first_job = self.submit()
        self.job = self.first_job
        self._mark = 0
        self._hurries = True
        self._unmended: Fault | None = None

    def submit(self) -> str:
        """Submit the shipped batch file; the job's number."""
        variables = {
            "PYTHONPATH": f"{self.cluster.root}/tests/cluster/planted:{self.cluster.root}",
            "DRILL_STEP_SECONDS": self._first.pace,
            "DRILL_PLANT": self._first.plant,
            "DRILL_MARK": self.run.folder / "planted",
        }
        exported = ",".join(f"{name}={value}" for name, value in variables.items())
        return self.cluster.submit(*srun_job(self.cluster, self.run, f"--export=ALL,{exported}", *self._first.options))

    def output(self) -> str:
        """All that the run has printed, whatever the job."""
        jobs = dict.fromkeys((self.first_job, self.job))
        return "".join(map(self.cluster.output, jobs))

    def new_output(self) -> str:
        """What was printed since the fault."""
        return self.output()[self._mark :]

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has done it; it may be queued again meanwhile."""
        self._until(lambda: self.run.step() >= step, START_SECONDS, f"step {step}")

    def meet(self, fault: Fault) -> Met:
        """Let the fault come in mid-course, and see what is said."""
        if fault.plant == "":
            self.wait_for_step(self.run.step() + STEPS_BETWEEN)
        self._mark = len(self.output())
        start, before = (self.job, self.cluster.restarts(self.job)), time.monotonic()
        self._unmended, self._hurries = fault, fault.hurries
        fault.inject(self)
        patience = fault.patience if fault.plant == "" else START_SECONDS
        self._until(lambda: re.search(fault.words, self.new_output()), patience, fault.words)
        said = time.monotonic()
        if fault.then != "on":
            self._until(lambda: self._has_left(*start), ENDED_WITHIN, f"end of job {start[0]}")
        gone = time.monotonic()
        line = re.search(f".*(?:{fault.words}).*", self.new_output())
        self.mend()
        if fault.then == "by hand":
            self.cluster.wait_for(self.job, ENDED, ENDED_WITHIN)
            self.job = self.submit()
        return Met(said - before, gone - said, line[0].strip() if line and fault.words else "")

    def mend(self) -> None:
        """Take back the fault that was injected last, unless that was done."""
        fault, self._unmended = self._unmended, None
        if fault is not None:
            fault.mend(self)

    def finish(self) -> str:
        """Wait until the run has ended; the state of its last job."""
        self._until(self._has_ended, 2 * START_SECONDS, "the end of the run")
        return self.state()

    def _has_ended(self) -> bool:
        deadline = time.monotonic() + 30.0
        while self.state() in ENDED and time.monotonic() < deadline:
            if self.cluster.is_idle():
                time.sleep(1.0)
                return self.state() in ENDED
            time.sleep(0.5)  # a job that is queued again is FAILED as long as its nodes are not free
        return self.state() in ENDED

    def state(self) -> str:
        """Of the job that has the run now."""
        return self.cluster.state(self.job)

    def _has_left(self, job: str, restarts: int) -> bool:
        return self.cluster.state(job) != "RUNNING" or self.cluster.restarts(job) > restarts

    def _until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{self.output()}"
            if self.state() == "PENDING" and self._hurries:
                self.cluster.hurry(self.job)
            time.sleep(0.3)


def leftovers(cluster: Cluster) -> list[str]:
    """Processes, listening ports and shared memory of jobs that are over."""
    found = []
    for host in cluster.nodes:
        if not cluster.is_up(host):
            continue
        processes = cluster.run(host, "ps", "-eo", "pid,args").splitlines()
        found += [f"{host}: {line.strip()}" for line in processes if re.search("python|srun|slurmstepd|_script", line)]
        found += [f"{host}: /dev/shm/{name}" for name in cluster.run(host, "ls", "-A", "/dev/shm").split()]
        ports = cluster.run(host, "ss", "-Hltn").splitlines()
        found += [f"{host}: {line}" for line in ports if not re.search(r":(22|6818)\s", line)]
    return found
