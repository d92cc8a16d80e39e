"""What control groups leave of a host's memory: schedulers and containers let a job have less than there is (no torch).

Linux' Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst: a group and each one above it may have a limit.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Room(NamedTuple):
    """What a group leaves."""

    free: int
    """Bytes up to its limit; its page cache makes way and does not count."""
    group: str
    """Its folder."""
    limit: int
    """Bytes that it may have in all."""


class _Names(NamedTuple):
    """A version's files, and what counts as page cache in its `memory.stat`."""

    limit: str
    usage: str
    cache: tuple[str, ...]


_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def tightest_room(root: Path = _ROOT, own: Path = _OWN) -> Room | None:
    """The group of this process that leaves least; None if no limit is found.

    Args:
        root: where the groups are.
        own: names those of this process, `number:controllers:path` a line.
    """
    return min(_all_rooms(root, own), default=None)


def smallest_limit(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Bytes that this process and all that share its groups may have; None if no limit is found. Arguments as above."""
    return min((room.limit for room in _all_rooms(root, own)), default=None)


def _all_rooms(root: Path, own: Path) -> Iterator[Room]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _rooms(root, path, _V2)
        elif "memory" in controllers.split(","):
            yield from _rooms(root / "memory", path, _V1)


def _rooms(mount: Path, path: str, names: _Names) -> Iterator[Room]:
    """What a group and those above it leave; in a container its own may stand at the mount, whatever its path says."""
    inner = PurePosixPath(path.lstrip("/"))
    if ".." in inner.parts:
        inner = PurePosixPath()
    for group in (inner, *inner.parents):
        try:
            limit = (mount / group / names.limit).read_text().strip()
            usage = int((mount / group / names.usage).read_text())
            stat = dict(line.split() for line in (mount / group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            cache = sum(int(stat.get(name, 0)) for name in names.cache)
            yield Room(max(int(limit) - usage + cache, 0), str(mount / group), int(limit))
