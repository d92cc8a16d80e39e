"""PREFIX.work: what an unfinished dataset consists of, so that it can be continued by any number of processes.

    plan.json           what is made: inputs, options, units; the same for all ranks
    00000012.*          a finished unit (see `encode`)
    input-00000003.json hash of an input
    rank-0.lock         held by rank 0 while it runs; merge.lock: by the one that merges

A lock goes with the process that holds it, also when that is killed (flock; on shared file systems it must be supported
across nodes, as Lustre with `-o flock` and NFS 4 do).
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.data.documents import Part, open_parquet
from megagpt.data.files import write_whole
from megagpt.data.inputs import Input
from megagpt.errors import DataError

_FORMAT = 2
_SMALLEST_UNIT_BYTES, _LARGEST_UNIT_BYTES = 1 << 22, 1 << 26
_UNITS_WANTED = 512

Unit = list[Part]


class DamagedWorkError(DataError):
    """What an earlier process has done was lost; the rest stays."""


@dataclass(frozen=True)
class Plan:
    """What is made of what. Units say how it is shared out; the result does not depend on them."""

    identity: dict[str, Any]
    """Options and fingerprint of the tokenizer: whatever has an influence on the result."""
    inputs: list[Input]
    units: list[Unit]
    world_size: int


def plan_units(inputs: Sequence[Input]) -> list[Unit]:
    """Cut and join the inputs into units of about equal size, in order.

    Raises:
        DataError: a Parquet file is damaged.
    """
    total = sum(source.bytes for source in inputs)
    wanted = min(max(total // _UNITS_WANTED, _SMALLEST_UNIT_BYTES), _LARGEST_UNIT_BYTES)
    units: list[Unit] = []
    size = wanted
    for index, source in enumerate(inputs):
        for part, part_bytes in _parts(index, source, wanted):
            if size >= wanted:
                units.append([])
                size = 0
            units[-1].append(part)
            size += part_bytes
    return units


def _parts(index: int, source: Input, wanted: int) -> Iterator[tuple[Part, int]]:
    if source.format == "parquet":
        metadata = open_parquet(source).metadata
        for group in range(metadata.num_row_groups):
            yield Part(index, group, group + 1), metadata.row_group(group).total_byte_size
    elif source.can_be_cut:
        for start in range(0, source.bytes, wanted):
            stop = min(start + wanted, source.bytes)
            yield Part(index, start, stop), stop - start
    else:
        yield Part(index), source.bytes


class WorkFolder:
    """The folder PREFIX.work of one dataset.

    Attributes:
        path: the folder.
    """

    def __init__(self, prefix: str | Path):
        """Name the folder; it need not exist."""
        self.path = Path(f"{prefix}.work")

    @contextmanager
    def taken_by(self, rank: int, wanted: Plan) -> Iterator[tuple[Plan, str]]:
        """Be rank `rank` of `wanted.world_size`: the plan to follow (that of earlier work if it is of the same things),
        and a notice ("" if there is nothing to tell).

        Raises:
            DataError: another process is that rank, or another job writes this dataset.
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked("plan.lock", "", wait=True):
            ours = self._try_lock(f"rank-{rank}.lock")
            if ours is None:
                raise self._busy(f"rank-{rank}.lock", rank, wanted.world_size)
            try:
                plan, notice = self._agree(rank, wanted)
            except BaseException:
                os.close(ours)
                raise
        try:
            yield plan, notice
        finally:
            os.close(ours)

    def _agree(self, rank: int, wanted: Plan) -> tuple[Plan, str]:
        """Join the ranks at work, or go on with what an ended job has left, or begin."""
        found = self.read_plan()
        if found is not None and found.world_size != wanted.world_size:
            for other in range(found.world_size):
                if other != rank and not self._is_free(f"rank-{other}.lock"):
                    raise self._busy(f"rank-{other}.lock", other, found.world_size)
        notice = ""
        difference = "" if found is None else _difference(found, wanted)
        if found is not None and difference:
            others = [r for r in range(found.world_size) if r != rank and not self._is_free(f"rank-{r}.lock")]
            if others:
                raise DataError(
                    f"{self.path}: rank {others[0]} of this job makes something else ({difference}); start all ranks"
                    " with the same options and inputs"
                )
            self._clear()
            found, notice = None, f"{self.path}: unfinished work of another kind was removed ({difference})"
        elif found is not None:
            finished = sum(self.is_done(number) for number in range(len(found.units)))
            notice = f"{self.path}: going on, {finished} of {len(found.units)} units are done" if finished else ""
        plan = Plan(wanted.identity, wanted.inputs, found.units if found else wanted.units, wanted.world_size)
        if found is None or found.world_size != plan.world_size:
            write_whole(self.path / "plan.json", json.dumps({"format": _FORMAT, **asdict(plan)}).encode())
        return plan, notice

    def read_plan(self) -> Plan | None:
        """What is being made here; None if that is unknown."""
        try:
            content = json.loads((self.path / "plan.json").read_bytes())
            if content.pop("format") != _FORMAT:
                return None
            content["inputs"] = [Input(**entry) for entry in content["inputs"]]
            content["units"] = [[Part(**part) for part in unit] for unit in content["units"]]
            return Plan(**content)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # of another version, or damaged: begin again

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".lock":
                path.unlink(missing_ok=True)

    def is_done(self, number: int) -> bool:
        """Whether a unit's files are complete."""
        return (self.path / f"{number:08d}.json").exists()

    def done(self, number: int) -> dict[str, Any]:
        """What a finished unit came to.

        Raises:
            DamagedWorkError: its file is damaged.
        """
        return self._finished(self.path / f"{number:08d}.json")

    def input_hash(self, index: int) -> str:
        """SHA-256 of an input.

        Raises:
            DamagedWorkError: its file is damaged.
        """
        return self._finished(self.hash_file(index))

    def _finished(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            raise self.damaged(path) from None

    def damaged(self, *paths: Path) -> "DamagedWorkError":
        """What to raise about damaged files, which are removed, and so made anew by the next start."""
        for path in paths:
            path.unlink(missing_ok=True)
        return DamagedWorkError(
            f"{paths[-1]} is not as it was written (has the machine crashed since?); start again to do this part anew"
        )

    def unit_is_damaged(self, number: int) -> "DamagedWorkError":
        """The same about a unit."""
        return self.damaged(*sorted(self.path.glob(f"{number:08d}.*")))

    def unit_file(self, number: int, key: int, what: str) -> Path:
        """Path of a finished unit's tokens or lengths."""
        return self.path / f"{number:08d}.{key}.{what}"

    def hash_file(self, index: int) -> Path:
        """Where the hash of an input is written."""
        return self.path / f"input-{index:08d}.json"

    def is_complete(self, plan: Plan) -> bool:
        """Whether all units are done and all inputs hashed."""
        return all(self.is_done(number) for number in range(len(plan.units))) and all(
            self.hash_file(index).exists() for index in range(len(plan.inputs))
        )

    @contextmanager
    def merging(self) -> Iterator[bool]:
        """Be the one that merges: True, unless another process does or all is over."""
        handle = self._try_lock("merge.lock") if self.path.is_dir() else None
        try:
            yield handle is not None and (self.path / "plan.json").exists()
        finally:
            if handle is not None:
                os.close(handle)

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, text: str, wait: bool) -> Iterator[None]:
        handle = self._try_lock(name, wait=wait)
        assert handle is not None, "it was waited for"
        try:
            yield
        finally:
            os.close(handle)

    def _try_lock(self, name: str, wait: bool = False) -> int | None:
        """Lock a file (created if need be), or None if another process holds it."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # Whoever held it may have removed the folder with the file.
                if os.path.exists(self.path / name) and os.stat(self.path / name).st_ino == os.fstat(handle).st_ino:
                    os.truncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return handle
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _is_free(self, name: str) -> bool:
        if not (self.path / name).exists():
            return True
        handle = self._try_lock(name)
        if handle is not None:
            os.close(handle)
        return handle is not None

    def _busy(self, name: str, rank: int, world_size: int) -> DataError:
        try:
            who = (self.path / name).read_text() or "another process"
        except OSError:
            who = "another process"
        return DataError(
            f"{self.path}: {who} is writing this dataset as rank {rank} of {world_size}; wait for it, or choose another"
            " output (ranks of one job need different --rank and the same --world-size)"
        )


def _difference(found: Plan, wanted: Plan) -> str:
    """What was made before, as against what is wanted."""
    if found.inputs != wanted.inputs:
        return "the inputs have changed"
    keys = [key for key in wanted.identity if found.identity.get(key) != wanted.identity[key]]
    return ", ".join(f"{key}: {found.identity.get(key)} before, {wanted.identity[key]} now" for key in keys)
