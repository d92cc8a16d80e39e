"""When the scheduler will take the job away, and how early a save has to start (no torch here)."""

import os
import subprocess
import time
from collections.abc import Mapping

FIRST_SAVE_SECONDS = 60.0
"""Taken for the length of a save until one has been measured, if not longer by its size."""
FIRST_SAVE_BYTES_PER_SECOND = 50e6
"""And by each rank: little for a file system that ranks share, but what is too early costs minutes, too late a save."""
FIRST_SAVE_SHARE = 0.25
"""And of the time that is left: a guess shall not take the time from all training."""
LEAVING_SECONDS = 15.0
"""To close files and process groups."""


def end_of_job(environ: Mapping[str, str] = os.environ) -> float | None:
    """When Slurm ends this job (seconds since the epoch); None outside Slurm or without a limit."""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if (told := environ.get("SLURM_JOB_END_TIME", "")).isdigit():
        return float(told)
    command = ["squeue", "--noheader", "--jobs", job, "--format=%e"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return time.mktime(time.strptime(answer, "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError):  # Slurm says N/A or NONE if there is no limit
        return None


class Deadline:
    """Says when it is time to save and leave.

    Args:
        ends_at: when the job is ended, seconds since the epoch; None: never.
        stop_at: when the run shall have stopped by itself, likewise.
        bytes_per_rank: of a checkpoint; None: nothing is saved.
    """

    def __init__(self, ends_at: float | None, stop_at: float | None = None, bytes_per_rank: int | None = 0):
        self.ends_at = min((moment for moment in (ends_at, stop_at) if moment is not None), default=None)
        self._first_save_seconds = 0.0
        if bytes_per_rank is not None:
            left = 0.0 if self.ends_at is None else self.ends_at - time.time()
            guess = min(bytes_per_rank / FIRST_SAVE_BYTES_PER_SECOND, FIRST_SAVE_SHARE * left)
            self._first_save_seconds = max(FIRST_SAVE_SECONDS, guess)
        self._save_seconds: float | None = None
        self._step_seconds = self._evaluation_seconds = 0.0

    def note_step(self, seconds: float) -> None:
        """Remember how long a step took; the slow ones weigh for long."""
        self._step_seconds = max(seconds, 0.9 * self._step_seconds)

    def note_evaluation(self, seconds: float) -> None:
        """Remember how long an evaluation took; the slowest one counts."""
        self._evaluation_seconds = max(seconds, self._evaluation_seconds)

    def note_save(self, seconds: float) -> None:
        """Remember how long a save took, until it was whole; the slowest one counts."""
        self._save_seconds = max(seconds, self._save_seconds or 0.0)

    def seconds_needed(self, evaluations: int = 0) -> float:
        """From the moment of asking to the end of this process: two more steps until all ranks know, the evaluations
        that are due by then, half as much again as the slowest save, and the way out."""
        save = self._first_save_seconds if self._save_seconds is None else 1.5 * self._save_seconds
        return 2 * self._step_seconds + evaluations * self._evaluation_seconds + save + LEAVING_SECONDS

    def is_near(self, evaluations: int = 0, now: float | None = None) -> bool:
        """Whether the save should start.

        Args:
            evaluations: see `seconds_needed`.
            now: seconds since the epoch, if not the present.
        """
        if self.ends_at is None:
            return False
        return self.ends_at - (time.time() if now is None else now) <= self.seconds_needed(evaluations)
