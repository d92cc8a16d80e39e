"""Whether the folders of a run are the same on all hosts."""

import contextlib
import os
import time
from pathlib import Path

from megagpt.plan import Plan
from megagpt.preflight.findings import Finding, failed, ok, some
from megagpt.preflight.host import nearest_folder
from megagpt.preflight.meeting import Meeting
from megagpt.preflight.worker import NoAnswerError, Worker
from megagpt.storage import RemotePath, location

_SECONDS = 30.0
_LOOKING_SECONDS = 10.0
"""Network file systems may take a moment."""
_ADVICE = "give a folder of a file system that all nodes share"


def check_shared(plan: Plan, meeting: Meeting, leaders: dict[str, int], host: str) -> list[Finding]:
    """Each host writes a file into each folder of the run, and all hosts look for all of them.

    Only the leaders take part, and all get the findings.

    Args:
        plan: of the run.
        meeting: of all ranks.
        leaders: first rank of each host.
        host: of this rank.
    """
    folders = {
        "checkpoint.directory": plan.run.checkpoint.directory,
        "logging.directory": plan.run.logging.directory,
    }
    return [
        _check_folder(key, directory, meeting, leaders, host)
        for key, directory in folders.items()
        if directory is not None and not isinstance(location(directory), RemotePath)
    ]


def _check_folder(key: str, directory: str, meeting: Meeting, leaders: dict[str, int], host: str) -> Finding:
    mine = f".megagpt-doctor-{host}-{os.getpid()}-{time.time_ns()}"
    meeting.note(f"the folder of {key}")
    with Worker(_answer) as worker:
        try:
            folder, problem = worker.ask(_SECONDS, "write", directory, {mine: host})
        except NoAnswerError as error:
            folder, problem = directory, f"{host} cannot write: that {error}"
        written = meeting.gather("written", [mine, problem], _SECONDS + 10, leaders.values())
        names = {written[rank][0]: name for name, rank in leaders.items() if rank in written and not written[rank][1]}
        try:
            unseen = worker.ask(_SECONDS, "look", folder, names)
        except NoAnswerError:
            unseen = list(names.values())
        seen = meeting.gather("seen", unseen, 2 * _SECONDS + 10, leaders.values())
        with contextlib.suppress(NoAnswerError):
            worker.ask(_SECONDS, "remove", folder, {mine: host})
    problems = [text for _, text in written.values() if text]
    split = [f"{name} does not see the file of {some(seen[rank])}" for name, rank in leaders.items() if seen.get(rank)]
    if problems or split:
        return failed(f"shared: {key}", f"{some(problems or split, '; ')} in {folder}", _ADVICE)
    return ok(f"shared: {key}", f"{folder} is one folder on all {len(seen)} hosts")


def _answer(what: str, directory: str, names: dict[str, str]) -> object:
    """In the worker: do one thing with files that bear the names of their hosts.

    Returns:
        The folder and what has gone wrong, after writing; the hosts whose files are not seen, after looking.
    """
    folder = nearest_folder(directory)
    if what == "look":
        return _unseen(folder, names)
    for name, host in names.items():
        if what == "write":
            return str(folder), _write(folder / name, host)
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return None


def _write(path: Path, text: str) -> str:
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{text} cannot write: {error.strerror}"
    return ""


def _unseen(folder: Path, names: dict[str, str]) -> list[str]:
    """The hosts whose files do not come in sight, looking for all of them together."""
    deadline = time.monotonic() + _LOOKING_SECONDS
    left = names
    while left := {name: host for name, host in left.items() if not _holds(folder / name, host)}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return list(left.values())


def _holds(path: Path, expected: str) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text() == expected
    return False
