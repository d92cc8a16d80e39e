"""Start a job again, or not: after a crash or a time limit, as long as the run gets on (no torch).

Asked by the batch files before and after the ranks run. What is known lies in a file beside the checkpoints, so that it
outlives jobs, nodes and this process.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from megagpt.errors import TRY_AGAIN, LaunchError, MegagptError, StorageError, exit_code_of
from megagpt.plan import RunConfig
from megagpt.storage import Location, RemotePath, location
from megagpt.storage.steps import step_folders, step_of
from megagpt.supervise.beats import FOLDER, BeatFolder, Verdict, starts
from megagpt.supervise.exclusion import followers, keep_off
from megagpt.supervise.slurm import PAUSES, NoAnswerError, ask

RECORD = "restarts.jsonl"


class Start(BaseModel):
    """One start of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    """Slurm's number of the first job of the chain."""
    step: int
    """Of the newest checkpoint at that time; 0: there was none."""
    time: float
    """Seconds since the epoch."""
    attempt: str = ""
    """Slurm's number of the job itself, and how often Slurm has started it again."""


def newest_step(run: RunConfig) -> int:
    """Step of the newest checkpoint, complete by the looks of it; 0 if there is none."""
    directory = location(run.checkpoint.directory) if run.checkpoint.directory else None
    if directory is None or (isinstance(directory, Path) and not directory.is_dir()):
        return 0
    whole = (folder for folder in step_folders(directory) if (folder / "manifest.sha256").exists())
    return next(map(step_of, whole), 0)


def begin(run: RunConfig, most_idle: int, environ: Mapping[str, str] = os.environ) -> str:
    """Note a start, unless the job has been started too often without getting on.

    That of a run which looks finished is not noted, as later jobs of a chain may find it: its ranks see whether it is,
    and go on from an older checkpoint if the last one is damaged.

    Args:
        run: the run config.
        most_idle: starts in a row from the same step that are allowed.
        environ: of the batch file.

    Returns:
        What has ended the start before, if its ranks knew: a job whose first host is lost cannot print it any more.

    Raises:
        LaunchError: this would be one too many.
        StorageError: it cannot be read or noted.
    """
    try:
        if run.checkpoint.directory is None or (step := newest_step(run)) >= run.training.steps:
            return ""
        path = location(run.checkpoint.directory) / RECORD
        idle = _idle_starts(path, _chain(environ), step)
        if idle >= most_idle:
            raise LaunchError(
                f"{path}: the last {idle} starts of this job all began at step {step} and ended before they had saved "
                "anything more; look at what they printed, mend it and submit again"
            )
        verdict = _verdict_of_last_start(run)
        _note(path, step, environ)
    except OSError as error:
        raise _away(error) from None
    return f"the start before this one was ended: {verdict.text}" if verdict else ""


def _note(path: Location, step: int, environ: Mapping[str, str]) -> None:
    start = Start(job=_chain(environ), step=step, time=time.time(), attempt=_attempt(environ))
    line = start.model_dump_json() + "\n"
    if isinstance(path, RemotePath):  # which cannot grow, but is replaced at once; one batch file writes it
        path.write_bytes((path.read_bytes() if path.exists() else b"") + line.encode())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _away(error: OSError) -> StorageError:
    return StorageError(f"{error}; see that the disk of the checkpoints and the way to it are up", exit_code_of(error))


def end(
    run: RunConfig,
    most_idle: int,
    status: int,
    may_requeue: bool = True,
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = print,
) -> int:
    """Have the job started again if that may help, or see to the next job of its chain.

    Args:
        run: the run config.
        most_idle: as for `begin`.
        status: exit status of the ranks.
        may_requeue: whether the job may be queued again; the rest of its chain goes on if not.
        environ: of the batch file.
        say: told what is done.

    Returns:
        Exit status for the batch file: not 0 if the run is not finished and nothing goes on by itself, for jobs that
        depend on it.
    """
    step = _newest_step_at_last(run)
    if run.checkpoint.directory is None:
        return status
    if status == 0 and step >= run.training.steps:
        say(f"the run is finished at step {step:,}")
        return 0
    if status == MegagptError.exit_code:
        say("not started again: the error is one to be mended")
        return status
    unfinished = status or TRY_AGAIN
    try:
        goes_on = _has_follower(run, most_idle, step, may_requeue, status == 0, environ, say)
    except NoAnswerError as error:
        say(f"{error}; unless it queues the job again, submit it again: it goes on from step {step:,}")
        return unfinished
    if not goes_on:
        return unfinished
    return 0 if may_requeue else status


def _has_follower(
    run: RunConfig,
    most_idle: int,
    step: int,
    may_requeue: bool,
    ended_well: bool,
    environ: Mapping[str, str],
    say: Callable[[str], None],
) -> bool:
    """Queue the job again, or find the next one of its chain; whether there is one that goes on from this step."""
    job = environ.get("SLURM_JOB_ID")
    if job is None or _state(job) != "RUNNING":
        say("not started again: the job was cancelled, or is none of Slurm's")
        return False
    num_nodes = int(environ.get("SLURM_NNODES", "1"))
    bad = _bad_hosts(run, num_nodes)
    if not may_requeue:
        if links := followers(job, ended_well):
            say(f"job {links[0]} goes on from step {step:,}{_without(bad, links, num_nodes)}")
            return True
        say(f"the run has come to step {step:,} of {run.training.steps:,}; submit it again, and it goes on from there")
        return False
    idle = _idle_starts_with_this_one(run, step, environ)
    if idle >= most_idle:
        say(f"not started again: {idle} starts in a row have not got beyond step {step:,}")
        return False
    # Slurm waits for this process to end, and only from now on lets the nodes be changed. It refuses a second time what
    # it has done the first time without being able to tell.
    if ask("scontrol", "requeue", job) is None and _state(job) == "RUNNING":
        say(f"Slurm does not queue job {job} again, as printed above; submit it again: it goes on from step {step:,}")
        return False
    say(f"job {job} is queued again and goes on from step {step:,}{_without(bad, [job], num_nodes)}")
    return True


def _idle_starts_with_this_one(run: RunConfig, step: int, environ: Mapping[str, str]) -> int:
    """As `_idle_starts`. The start is noted now if its beginning could not do so: one that never can is no loop."""
    assert run.checkpoint.directory is not None, "the caller has a checkpoint directory"
    path = location(run.checkpoint.directory) / RECORD
    try:
        if not any(start.attempt == _attempt(environ) for start in _starts(path)):
            _note(path, step, environ)
        return _idle_starts(path, _chain(environ), step)
    except OSError as error:
        raise _away(error) from None


def _state(job: str) -> str:
    """In Slurm's words; empty if it knows no such job, or there is no Slurm."""
    return (ask("squeue", "--noheader", "--jobs", job, "--format=%T") or "").strip()


def _newest_step_at_last(run: RunConfig) -> int:
    """As `newest_step`; a storage that is away for a moment, which may be why the ranks have ended, is waited for."""
    for pause in PAUSES:
        try:
            return newest_step(run)
        except (MegagptError, OSError) as error:
            if exit_code_of(error) != TRY_AGAIN:
                raise
            print(f"{error}; looking again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return newest_step(run)


def _without(bad: list[str], jobs: list[str], num_nodes: int) -> str:
    """Have jobs start without some nodes; in words that continue a sentence about them."""
    reasons = [keep_off(job, bad, num_nodes) for job in jobs] if bad else []
    if reason := next(filter(None, reasons), ""):
        return f"; {', '.join(bad)} may be among its nodes again: {reason}"
    return f" without {', '.join(bad)}" if bad else ""


def _chain(environ: Mapping[str, str]) -> str:
    return environ.get("MEGAGPT_CHAIN") or environ.get("SLURM_JOB_ID") or "none"


def _attempt(environ: Mapping[str, str]) -> str:
    return f"{environ.get('SLURM_JOB_ID', 'none')}-{environ.get('SLURM_RESTART_COUNT', '0')}"


def _idle_starts(path: Location, chain: str, step: int) -> int:
    """How many of the last starts of this chain began where the run still is."""
    idle = 0
    for start in reversed(_starts(path)):
        if start.job == chain:
            if start.step != step:
                break
            idle += 1
    return idle


def _starts(path: Location) -> list[Start]:
    starts = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                starts.append(Start.model_validate_json(line))
            except ValidationError:  # cut off by a kill
                continue
    return starts


def _bad_hosts(run: RunConfig, num_nodes: int) -> list[str]:
    """Hosts that the last verdict of this start holds responsible, if it is not all of them."""
    verdict = _verdict_of_last_start(run)
    if verdict is None or not _blames_host(verdict):
        return []
    return verdict.hosts if len(verdict.hosts) < num_nodes or num_nodes == 1 else []


def _verdict_of_last_start(run: RunConfig) -> Verdict | None:
    """Why the ranks of the last start that was noted have ended it, if they have."""
    parent = run.shared_folder
    if parent is None:
        return None
    assert run.checkpoint.directory is not None, "the caller has a checkpoint directory"
    folders = starts(Path(parent) / FOLDER)
    verdict = BeatFolder(folders[-1]).verdict() if folders else None
    noted = _starts(location(run.checkpoint.directory) / RECORD)
    is_old = verdict is None or not noted or folders[-1].stat().st_mtime < noted[-1].time
    return None if is_old else verdict


def _blames_host(verdict: Verdict) -> bool:
    return verdict.kind in ("lost", "stuck", "unreliable") or "CUDA error" in verdict.text
