"""Documents in and out: the inputs' records, and JSONL files of those that stay."""

import gzip
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from megagpt.cleaning.duplicates import REASONS, read_duplicates
from megagpt.cleaning.ledger import Ledger, num_bytes
from megagpt.data.documents import LONG_BYTES, Part, read_documents
from megagpt.data.files import publish, temporary_name, write_whole
from megagpt.data.inputs import Input

_SOURCE = np.dtype([("file", "<u4"), ("place", "<u8")])
SUFFIXES = {"gz": ".jsonl.gz", "zst": ".jsonl.zst", "none": ".jsonl"}


def source_name(source: Input, place: int) -> str:
    """Where a document is (see `Document.place` of `megagpt.data.documents`)."""
    if source.format == "text":
        return source.path
    return f"{source.path}: {'row' if source.format == 'parquet' else 'line' if source.compression else 'byte'} {place}"


class Reader(PipelineStep):
    """Reads the inputs' parts of a task, with the same errors as preprocessing; takes the place of datatrove's readers,
    which pass over damaged lines."""

    type, name = "megagpt", "read"

    def __init__(
        self, inputs: Sequence[Input], units: Sequence[Sequence[Part]], text_key: str, on_bad_line: str, ledger: Ledger
    ):
        super().__init__()
        self._inputs, self._units, self._text_key, self._on_bad_line = inputs, units, text_key, on_bad_line
        self._ledger = ledger

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Documents of a task.

        Raises:
            DataError: an input is damaged or, unless skipped, a line is no document.
        """
        entered = self._ledger.steps["read"].entered
        for part in self._units[rank]:
            source = self._inputs[part.file]
            for found in read_documents(source, part.start, part.stop, [self._text_key], whole_records=True):
                if found.fault is not None:
                    if self._on_bad_line == "error":
                        raise found.error(found.fault)
                    entered.add(1, 0)
                    self._ledger.count_dropped("read", "bad line", 1, 0)
                    continue
                text = found.texts[0]
                if not isinstance(text, str):
                    # Rules are about whole texts; one of this size would have to be held in memory many times over.
                    entered.add(1, found.num_bytes)
                    self._ledger.count_dropped("read", f"over {LONG_BYTES >> 20} MiB", 1, found.num_bytes)
                    continue
                size = num_bytes(text)
                entered.add(1, size)
                if not text.strip():
                    self._ledger.count_dropped("read", "no text", 1, size)
                    continue
                record = found.record() if found.record is not None else {self._text_key: text}
                metadata = {"record": record, "source": (part.file, found.place)}
                yield Document(text, source_name(source, found.place), metadata=metadata)


class KeptWriter(PipelineStep):
    """Writes what a task keeps, and where it came from, and passes it on. All fields stay as they are but the text."""

    type, name = "megagpt", "write"

    def __init__(self, folder: Path, text_key: str, compression: str):
        super().__init__()
        self._folder, self._text_key, self._compression = folder, text_key, compression

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write the documents of a task."""
        sources = []
        with writing(shard_file(self._folder, rank, self._compression), self._compression) as file:
            for document in data:
                record = document.metadata["record"]
                record[self._text_key] = document.text
                file.write(json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n")
                sources.append(document.metadata["source"])
                yield document
        write_whole(_sources_file(self._folder, rank), np.array(sources, _SOURCE).tobytes())


class ShardWriter(PipelineStep):
    """Writes the final file of a task: what it kept but for duplicates. Nothing is written if nothing is left."""

    type, name = "megagpt", "shards"

    def __init__(self, kept: Path, duplicates: Path, output: Path, inputs: Sequence[Input], options: dict[str, Any]):
        """Take documents from `kept` and leave out those listed in `duplicates`.

        `options`: text_key, compression, and the samples' `per_reason` and `max_characters`.
        """
        super().__init__()
        self._kept, self._duplicates, self._output, self._inputs = kept, duplicates, output, inputs
        self._options = options

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the file of a task."""
        compression, text_key = self._options["compression"], self._options["text_key"]
        kept, target = (shard_file(folder, rank, compression) for folder in (self._kept, self._output))
        ledger = Ledger([], self._options["per_reason"], self._options["max_characters"])
        gone = {number: (reason, first) for number, reason, first in read_duplicates(self._duplicates, rank)}
        sources = _read_sources(self._kept, rank)
        target.unlink(missing_ok=True)
        if not gone and sources:
            self._output.mkdir(parents=True, exist_ok=True)
            _link(kept, target)
        elif len(gone) < len(sources):
            with writing(target, compression) as file:
                for number, line in enumerate(read_lines(kept, compression)):
                    if number not in gone:
                        file.write(line)
        if gone:
            for number, line in enumerate(read_lines(kept, compression)):
                if number in gone:
                    reason, first = gone[number]
                    details = {"first": first}
                    document = Document(json.loads(line)[text_key], self._name(sources[number]), metadata=details)
                    step = REASONS[reason].replace(" ", "_") + "s"
                    ledger.steps.setdefault(step, type(ledger.steps["read"])())
                    ledger.drop(step, REASONS[reason], document)
        ledger.save(ledger_file(self._output.parent, rank))

    def _name(self, source: tuple[int, int]) -> str:
        return source_name(self._inputs[source[0]], source[1])


def ledger_file(work: Path, rank: int) -> Path:
    """Where a task's count of duplicates is."""
    return work / "duplicates" / f"{rank:05d}.json"


def shard_file(folder: Path, rank: int, compression: str) -> Path:
    """File of a task."""
    return folder / f"{rank:05d}{SUFFIXES[compression]}"


def kept_document(kept: Path, rank: int, number: int, inputs: Sequence[Input], compression: str) -> tuple[str, Any]:
    """Source and record of a document that a task has kept."""
    file, place = _read_sources(kept, rank)[number]
    for at, line in enumerate(read_lines(shard_file(kept, rank, compression), compression)):
        if at == number:
            return source_name(inputs[file], place), json.loads(line)
    raise AssertionError("each source has a line")


def _sources_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.sources"


def _read_sources(folder: Path, rank: int) -> list[tuple[int, int]]:
    return np.fromfile(_sources_file(folder, rank), _SOURCE).tolist()


def _link(kept: Path, target: Path) -> None:
    try:
        os.link(kept, target)
    except OSError:  # not every file system has links
        temporary = temporary_name(target)
        shutil.copyfile(kept, temporary)
        publish(temporary, target)


@contextmanager
def writing(path: Path, compression: str) -> Iterator[BinaryIO]:
    """A file that is whole or absent, compressed on the way; the same bytes give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as raw:
            if compression == "gz":
                with gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
                    yield cast(BinaryIO, packed)
            elif compression == "zst":
                import zstandard

                with zstandard.ZstdCompressor(level=6).stream_writer(raw, closefd=False) as packed:
                    yield cast(BinaryIO, packed)
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: Path, compression: str) -> Iterator[bytes]:
    """Lines of a file that `writing` made."""
    with path.open("rb") as raw:
        if compression == "gz":
            yield from gzip.GzipFile(fileobj=raw)
        elif compression == "zst":
            import io

            import zstandard

            yield from io.BufferedReader(cast(Any, zstandard.ZstdDecompressor().stream_reader(raw)))
        else:
            yield from raw
