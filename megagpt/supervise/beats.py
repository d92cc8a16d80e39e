"""Heartbeats in files: one per rank, in a folder that all hosts share (no torch).

Files are replaced as a whole, so that a reader never sees half of one; nothing is fsynced, as none of it has to outlive
a power failure.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from megagpt.supervise.pulse import Phase

FOLDER = "watchdog"
"""Beside the logs; holds a folder for each start."""
REPORT = "report.txt"
_VERDICT = "verdict.json"
_STACKS_WANTED = "stacks-wanted"
_KEPT_STARTS = 4
SECONDS_BETWEEN_BEATS = 5.0
"""At most."""


def name_of_start() -> str:
    """Of the folder of a start that this process makes now; later ones sort behind it."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"


class Beat(BaseModel):
    """One rank as its watchdog has last described it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int
    host: str
    pid: int
    pid_started: int
    """Clock ticks from boot to the start of the process: tells it from a later one with its pid."""
    pid_space: str = ""
    """What its pid is a number of; see `pid_space`."""
    stage: int
    data: int
    context: int
    tensor: int
    step: int
    microbatch: int | None
    phase: Phase
    count: int
    """Phases entered so far."""
    number: int
    """How often this rank has beaten; one that does not grow any more is frozen or gone."""
    still_for: float
    """Seconds in the present phase."""
    is_stuck: bool
    """In it for longer than the patience that it deserves."""
    where: str = ""
    """File, line and function, once stacks are wanted."""


class Verdict(BaseModel):
    """Why the job ends; the first one written holds for all ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    """`failed` (a rank raised an error), `unreliable` (a device or transfer erred silently), `lost` (a rank is gone or
    frozen) or `stuck` (no rank goes on)."""
    by: int
    """The rank that wrote it."""
    text: str
    culprits: list[int]
    hosts: list[str]
    """Of the culprits."""
    exit_code: int


def starts(parent: Path) -> list[Path]:
    """Folders of all starts that are kept, the one last written to last: by the clock of the file system, not by their
    names, as hosts' clocks differ."""
    folders = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        with contextlib.suppress(OSError):  # removed meanwhile
            folders += [(path.stat().st_mtime, path)] if path.is_dir() else []
    return [path for _, path in sorted(folders)]


class BeatFolder:
    """The files of one start of a run.

    Args:
        folder: shared by all ranks, for this start only.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def create(self) -> None:
        """Make it, on one rank; older starts' folders are removed but for the last few."""
        self.folder.mkdir(parents=True, exist_ok=True)
        others = [folder for folder in starts(self.folder.parent) if folder != self.folder]
        for old in others[: 1 - _KEPT_STARTS]:
            shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Take it away after a run that came to its end, and its parent if nothing else is in there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def write(self, beat: Beat) -> None:
        """Replace a rank's beat."""
        self._replace(self.folder / f"rank-{beat.rank:05d}.json", beat.model_dump_json())

    def read(self, rank: int) -> Beat | None:
        """A rank's last beat, if there is one."""
        try:
            return Beat.model_validate_json((self.folder / f"rank-{rank:05d}.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def withdraw(self, rank: int) -> None:
        """Say without space on the disk that a rank leaves as agreed."""
        with contextlib.suppress(OSError):
            (self.folder / f"rank-{rank:05d}.json").unlink()

    def is_withdrawn(self, rank: int) -> bool:
        """Whether a rank that had a beat has none any more, although the folder is there."""
        return self.folder.exists() and not (self.folder / f"rank-{rank:05d}.json").exists()

    def pass_verdict(self, verdict: Verdict) -> Verdict:
        """Write the verdict unless there is one; returns the one that holds."""
        mine = self.folder / f".verdict-{verdict.by}"
        try:
            mine.write_text(verdict.model_dump_json())
            os.link(mine, self.folder / _VERDICT)  # fails if it exists, on network file systems too
            self._replace(self.folder / REPORT, verdict.text + "\n")
        except FileExistsError:
            return self.verdict() or verdict
        except OSError:  # the disk is full or gone: each rank for itself
            return verdict
        finally:
            mine.unlink(missing_ok=True)
        return verdict

    def verdict(self) -> Verdict | None:
        """Why the job ends, if it does."""
        try:
            return Verdict.model_validate_json((self.folder / _VERDICT).read_bytes())
        except (OSError, ValidationError):
            return None

    def claim(self, what: str) -> bool:
        """Whether this is the first rank that asks to do something which one rank does for all."""
        try:
            (self.folder / f".{what}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # the disk is full or gone: each rank for itself
            return True
        return True

    def want_stacks(self) -> None:
        """Ask each rank for its Python stack."""
        with contextlib.suppress(OSError):
            (self.folder / _STACKS_WANTED).touch()

    @property
    def stacks_are_wanted(self) -> bool:
        return (self.folder / _STACKS_WANTED).exists()

    def stack_path(self, rank: int) -> Path:
        """Where a rank writes its Python stack."""
        return self.folder / f"stack-{rank:05d}.txt"

    def _replace(self, path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)


def pid_space() -> str:
    """What the process numbers that this process sees are numbers of: one boot of a host, and one of its namespaces."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def process_state(pid: int, started: int) -> str | None:
    """State of a process of this host in words; None if it is gone (or another one has its pid)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if int(fields[19]) != started or fields[0] in "ZX":
        return None
    words = {
        "T": "stopped by a signal (SIGSTOP)",
        "t": "stopped by a debugger",
        "D": "waiting for a disk or network file system",
    }
    return words.get(fields[0], "running" if fields[0] == "R" else "sleeping")


def process_start(pid: int) -> int:
    """Clock ticks from boot to the start of a process of this host."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
