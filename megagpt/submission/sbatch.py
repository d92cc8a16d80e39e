"""Submit a job, or a chain of them; or show the commands that would.

Plain sbatch rather than submitit: the batch files are what runs, so that they can be read, changed and submitted by
hand, and nothing is pickled for the nodes.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import ConfigError, LaunchError
from megagpt.submission.jobs import Job

# What Slurm says, and what mends it.
_ADVICE = (
    ("invalid partition", "give one of `sinfo` as --partition"),
    ("invalid account", "give one of `sacctmgr show associations user=$USER` as --account, that may use the partition"),
    ("invalid qos", "give one of `sacctmgr show qos` as --qos"),
    ("time limit", "give a --time that the partition allows (`sinfo`), and --chain for what takes longer"),
    ("node configuration is not available", "no node has as many GPUs, CPUs or memory; ask for less per node"),
    ("nodes not available", "look at `sinfo`: nodes are down, or fewer than asked for"),
    ("invalid job array", "use fewer --tasks (`scontrol show config` tells MaxArraySize)"),
    ("job submit limit", "you have as many jobs in the queue as you may; wait, or use a shorter --chain"),
    ("dependency problem", "the job of --after is not known (any more); look at `squeue`"),
    ("unable to contact", "Slurm's controller does not answer; try again later, or ask its administrators"),
    ("configuration source", "this host is not set up for Slurm; run this on a login node, or add --print"),
    ("munge", "the munge daemon of this host does not work; ask the administrators"),
)


@dataclass(frozen=True)
class Chain:
    """Jobs that follow each other."""

    length: int = 1
    after: tuple[str, ...] = ()
    """Jobs that must have ended well before the first one starts."""
    only_after_success: bool = False
    """Whether the next job of the chain starts only if the one before has ended well, or however it has ended."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, as written."""

    def require_possible(self, job: Job) -> None:
        """See that the chain makes sense.

        Raises:
            ConfigError: it does not.
        """
        if self.length < 1:
            raise ConfigError(f"--chain={self.length} is less than 1; give the number of jobs")
        if strange := [option for option in self.options if not option.startswith("-")]:
            raise ConfigError(f"--sbatch={strange[0]} is no option of sbatch; write it as --sbatch=--exclude=node7")
        if bad := [name for name in self.after if not re.fullmatch(r"\d+(_\d+)?", name)]:
            raise ConfigError(f"--after={','.join(bad)} is no number of a job; give one that `squeue` shows")
        if self.length > 1 and job.plan is not None and job.plan.run.checkpoint.directory is None:
            raise ConfigError(
                "--chain needs checkpoint.directory, from which each job goes on; set it in the run config, or add "
                "checkpoint.directory=FOLDER"
            )

    def links(self, job: Job) -> list[tuple[dict[str, str], list[str]]]:
        """Variables and command of each job, in which `$first` and `$last` stand for the first job and the one before.

        In a chain no job has itself queued again: the next one goes on.
        """
        condition, found = "afterok" if self.only_after_success else "afterany", []
        for number in range(self.length):
            variables, options = dict(job.variables), list(self.options)
            if self.length > 1 and "REQUEUE=" in Path(job.batch_file).read_text():
                variables["REQUEUE"] = "no"
            if number == 0 and self.after:
                options += [f"--dependency=afterok:{':'.join(self.after)}", "--kill-on-invalid-dep=yes"]
            if number > 0:
                variables["MEGAGPT_CHAIN"] = "$first"  # restarts are counted over the whole chain
                options += [f"--dependency={condition}:$last", "--kill-on-invalid-dep=yes"]
            found.append((variables, job.words(options)))
        return found


def script(job: Job, chain: Chain) -> str:
    """The commands that `submit` would run, for a shell."""
    lines = []
    links = chain.links(job)
    for number, (variables, words) in enumerate(links):
        command = " ".join([*(f"{key}={_quoted(value)}" for key, value in variables.items()), *map(_quoted, words)])
        if len(links) == 1:
            lines.append(command.replace(" --parsable", ""))
        elif number == 0:
            lines += [f"first=$({command})", "last=$first"]
        else:
            lines.append(f"last=$({command})")
    return "\n".join(lines)


def submit(job: Job, chain: Chain) -> list[str]:
    """Submit a job, or all jobs of a chain.

    Returns:
        Slurm's numbers of the jobs.

    Raises:
        LaunchError: there is no sbatch here, or it refuses; the message says what is in the queue by then.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on PATH; run this on a login node of the cluster, or add --print to see the commands"
        )
    jobs: list[str] = []
    for variables, words in chain.links(job):
        known = {"$first": jobs[0], "$last": jobs[-1]} if jobs else {}
        environ = os.environ | {key: known.get(value, value) for key, value in variables.items()}
        command = [_filled(word, known) if word.startswith("--dependency=") else word for word in words]
        try:
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False, env=environ
            )
        except subprocess.TimeoutExpired:
            raise LaunchError(_refused("it has not answered for two minutes", jobs)) from None
        number = result.stdout.strip().partition(";")[0]
        if result.returncode or not re.fullmatch(r"\d+", number):
            raise LaunchError(_refused(result.stderr or result.stdout or f"status {result.returncode}", jobs))
        jobs.append(number)
    return jobs


def _filled(word: str, known: dict[str, str]) -> str:
    for name, value in known.items():
        word = word.replace(name, value)
    return word


def _quoted(word: str) -> str:
    """For a shell, in which `$first` and `$last` of our own are to be replaced."""
    if word == "$first" or re.fullmatch(r"--dependency=\w+:\$last", word):
        return word
    return shlex.quote(word)


def _refused(text: str, jobs: Sequence[str]) -> str:
    said = "; ".join(
        line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in text.strip().splitlines()
    )
    advice = next((advice for words, advice in _ADVICE if words in said.lower()), "see `man sbatch` for what it means")
    message = f"sbatch has refused the job: {said}; {advice}"
    if jobs:
        message += f". Queued already: {', '.join(jobs)}; `scancel {' '.join(jobs)}` takes them back"
    return message
