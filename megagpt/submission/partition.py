"""What Slurm says of a partition: its time limit, and how many nodes, CPUs and GPUs it has."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import LaunchError
from megagpt.plan.wording import or_list

FORMAT = "%P|%l|%D|%c|%G"
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")
_TIMES = (
    (re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?"), (86400, 3600, 60, 1)),  # days-hours[:minutes[:seconds]]
    (re.compile(r"(\d+):(\d+):(\d+)"), (3600, 60, 1)),
    (re.compile(r"(\d+)(?::(\d+))?"), (60, 1)),  # minutes[:seconds]
)


@dataclass(frozen=True)
class Partition:
    """One partition, all its nodes taken together."""

    name: str
    limit_seconds: int | None
    """Longest job; None: no limit."""
    nodes: int
    cpus_per_node: int
    """Of the smallest node."""
    gpus_per_node: int
    """Of the node with most; 0: there are none."""


def parse_time(text: str) -> int:
    """Seconds of one of Slurm's notations, such as `90`, `1:30:00` or `2-12`.

    Raises:
        LaunchError: it is none of them, or no time at all.
    """
    for pattern, units in _TIMES:
        if match := pattern.fullmatch(text):
            seconds = sum(int(part or 0) * unit for part, unit in zip(match.groups(), units, strict=True))
            if seconds > 0:
                return seconds
    raise LaunchError(
        f"--time={text} is no time that Slurm knows; write minutes (90), hours:minutes:seconds (12:00:00), days-hours "
        "(2-12) or days-hours:minutes:seconds"
    )


def show_time(seconds: int) -> str:
    """A time as Slurm writes it: `12:00:00`, `2-00:00:00`."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def find_partition(name: str | None, environ: Mapping[str, str] | None = None) -> Partition | None:
    """Ask Slurm for a partition.

    Args:
        name: its name; None: the one that jobs go to by default.
        environ: variables for Slurm's command; default: those of this process.

    Returns:
        None if Slurm does not answer, or several partitions are named: sbatch will say what it thinks of them.

    Raises:
        LaunchError: Slurm knows no such partition.
    """
    command = ["sinfo", "--noheader", "--all", f"--format={FORMAT}"]
    try:
        told = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=True, env=environ
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    groups: dict[str, list[list[str]]] = {}
    default = None
    for line in told.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 5:
            return None
        label = fields[0].removesuffix("*")
        default = label if fields[0].endswith("*") else default
        groups.setdefault(label, []).append(fields)
    wanted = name or default
    if not groups or wanted is None or "," in wanted:
        return None
    if wanted not in groups:
        raise LaunchError(f"--partition={wanted} is none of this cluster's; use {or_list(sorted(groups))}")
    return _joined(wanted, groups[wanted])


def _joined(name: str, rows: list[list[str]]) -> Partition:
    """Slurm gives one row for each kind of node."""
    limit = None if rows[0][1] in ("infinite", "n/a") else parse_time(rows[0][1])
    gpus = [sum(int(count) for count in _GPUS.findall(row[4])) for row in rows]
    cpus = [int(re.findall(r"\d+", row[3])[0]) for row in rows]
    return Partition(name, limit, sum(int(row[2]) for row in rows), min(cpus), max(gpus))
