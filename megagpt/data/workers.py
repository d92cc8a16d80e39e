"""Runs units and hashes in processes, or in this one (which imports nothing that only processes need)."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.data.documents import Part
from megagpt.data.encode import Encoder, Encoding
from megagpt.data.files import write_whole
from megagpt.data.inputs import Input
from megagpt.data.progress import ByteProgress
from megagpt.data.work import Plan, WorkFolder
from megagpt.errors import DataError
from megagpt.storage.transfer import sha256_of

if TYPE_CHECKING:
    from concurrent.futures import Future

_SECONDS_BETWEEN_LOOKS = 0.2


class WorkerKilledError(DataError):
    """A process of ours was killed; what is done stays."""


class _Worker:
    """What one process needs to do units."""

    def __init__(self, encoding: Encoding, inputs: Sequence[Input], folder: Path, encoder: Encoder | None = None):
        self._encoding, self._inputs, self._folder = encoding, inputs, folder
        self._encoder = encoder

    def unit(self, number: int, parts: Any, report: Any) -> None:
        self._encoder = self._encoder or Encoder.load(self._encoding)
        self._encoder.encode_unit(number, parts, self._inputs, self._folder, report)

    def hash(self, index: int, target: Path) -> None:
        try:
            found = sha256_of(Path(self._inputs[index].path))
        except OSError as error:
            raise DataError(f"input {self._inputs[index].path} cannot be read ({error.strerror})") from None
        write_whole(target, json.dumps(found).encode(), durable=False)


def run_here(work: WorkFolder, plan: Plan, encoder: Encoder, todo: "Todo", progress: ByteProgress) -> None:
    """Do the units and hashes of a rank in this process.

    Raises:
        DataError: an input is unusable.
        OSError: the disk is full or gone.
    """
    worker = _Worker(encoder.encoding, plan.inputs, work.path, encoder)
    for number in todo.units:
        worker.unit(number, plan.units[number], progress.advance)
    for index in todo.hashes:
        worker.hash(index, work.hash_file(index))


class Todo:
    """Units and hashes of one rank that are not done yet, and what is done already in bytes."""

    def __init__(self, work: WorkFolder, plan: Plan, rank: int):
        """Look into the work folder."""
        own = range(rank, len(plan.units), plan.world_size)
        self.units = [number for number in own if not work.is_done(number)]
        hashes = range(rank, len(plan.inputs), plan.world_size)
        self.hashes = [index for index in hashes if not work.hash_file(index).exists()]
        sizes = unit_bytes(plan)
        self.total_bytes = sum(sizes[number] for number in own)
        self.left_bytes = sum(sizes[number] for number in self.units)


def unit_bytes(plan: Plan) -> list[int]:
    """Bytes of input of each unit; the row groups of a Parquet file count as equal."""
    parts_of_file = Counter(part.file for unit in plan.units for part in unit)

    def part_bytes(part: Part) -> int:
        source = plan.inputs[part.file]
        if part.stop < 0:
            return source.bytes
        return source.bytes // parts_of_file[part.file] if source.format == "parquet" else part.stop - part.start

    return [sum(map(part_bytes, unit)) for unit in plan.units]


def run_in_processes(
    work: WorkFolder, plan: Plan, encoding: Encoding, todo: Todo, progress: ByteProgress, workers: int
) -> None:
    """Do the units and hashes of a rank in `workers` processes.

    Raises:
        DataError: an input is unusable, or a process was killed.
        OSError: the disk is full or gone.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Spawned, not forked: a fork while another thread holds a lock would hang.
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoding, plan.inputs, work.path, reports))
    try:
        jobs = [pool.submit(_unit_in_worker, number, plan.units[number]) for number in todo.units]
        jobs += [pool.submit(_hash_in_worker, index, work.hash_file(index)) for index in todo.hashes]
        for job in _as_they_end(jobs, reports, progress):
            job.result()
    except BrokenProcessPool:
        raise WorkerKilledError(
            "a worker process was killed, most often for want of memory; start again with fewer --workers to go on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_they_end(jobs: "Sequence[Future]", reports: Any, progress: ByteProgress) -> "Iterator[Future]":
    from concurrent.futures import FIRST_COMPLETED, wait

    running = set(jobs)
    while running:
        ended, running = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
        while not reports.empty():
            progress.advance(*reports.get())
        yield from ended


_worker: _Worker | None = None
_reports: Any = None


def _start_worker(encoding: Encoding, inputs: Sequence[Input], folder: Path, reports: Any) -> None:
    import threading

    global _worker, _reports
    _worker, _reports = _Worker(encoding, inputs, folder), reports
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """For a thread of a worker: one whose parent was killed would wait for work for ever."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    parent.join()
    os._exit(1)


def _unit_in_worker(number: int, parts: Any) -> None:
    assert _worker is not None, "the pool's initializer has run"
    _worker.unit(number, parts, lambda *done: _reports.put(done))


def _hash_in_worker(index: int, target: Path) -> None:
    assert _worker is not None, "the pool's initializer has run"
    _worker.hash(index, target)
