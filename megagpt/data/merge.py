"""Finished units to one dataset: copied in order, or in an order drawn by a seed; nothing is held in memory."""

import os
from collections.abc import Iterator

import numpy as np
import xxhash

from megagpt.data.indexed import IndexedWriter
from megagpt.data.order import keyed_permutation_array
from megagpt.data.work import WorkFolder

_ROWS_PER_CHUNK = 1 << 20
_DOCUMENTS_PER_CHUNK = 1 << 16
_BYTES_PER_READ = 1 << 22


def merge_units(work: WorkFolder, num_units: int, key: int, writer: IndexedWriter, seed: int | None) -> None:
    """Write all documents of one key.

    Args:
        work: holds the finished units.
        num_units: how many there are.
        key: number of the text key.
        writer: takes the documents.
        seed: draws the order of the documents; None: that of the inputs.

    Raises:
        DamagedWorkError: a unit's files are not as they were written.
        OSError: the disk is full or gone.
    """
    if seed is not None:
        _merge_shuffled(work, num_units, key, writer, seed)
        return
    for number in range(num_units):
        for tokens in _chunks(work, number, key, "tokens", writer.dtype):
            writer.add_tokens(tokens)
        for lengths in _chunks(work, number, key, "lengths", np.dtype("<i4")):
            writer.add_lengths(lengths)


def _chunks(work: WorkFolder, number: int, key: int, what: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """One of a unit's files, some rows at a time, compared with its hash at the end."""
    expected = work.done(number)["hashes"][key][what]
    found = xxhash.xxh3_128()
    try:
        with work.unit_file(number, key, what).open("rb") as file:
            while content := file.read(_ROWS_PER_CHUNK * dtype.itemsize):
                found.update(content)
                if len(content) % dtype.itemsize:
                    break
                yield np.frombuffer(content, dtype=dtype)
    except FileNotFoundError:
        raise work.unit_is_damaged(number) from None
    if found.hexdigest() != expected:
        raise work.unit_is_damaged(number)


def _merge_shuffled(work: WorkFolder, num_units: int, key: int, writer: IndexedWriter, seed: int) -> None:
    """All tokens go to one file in the order of the inputs, and from there, document by document, to their place."""
    tokens_path, starts_path = work.path / f"ordered.{key}.tokens", work.path / f"ordered.{key}.starts"
    num_documents = 0
    with tokens_path.open("wb") as tokens_file, starts_path.open("wb") as starts_file:
        start = np.zeros(1, dtype=np.int64)
        starts_file.write(start.data)
        for number in range(num_units):
            for tokens in _chunks(work, number, key, "tokens", writer.dtype):
                tokens_file.write(tokens.data)
            for lengths in _chunks(work, number, key, "lengths", np.dtype("<i4")):
                ends = start[-1] + np.cumsum(lengths, dtype=np.int64)
                starts_file.write(ends.data)
                start = ends
                num_documents += len(lengths)
    num_tokens = int(start[-1])
    starts = np.memmap(starts_path, dtype=np.int64, mode="r")
    with tokens_path.open("rb") as file:
        for first in range(0, num_documents, _DOCUMENTS_PER_CHUNK):
            rows = np.arange(first, min(first + _DOCUMENTS_PER_CHUNK, num_documents))
            # Not numpy's generators: their streams may change between versions.
            chosen = keyed_permutation_array(rows, num_documents, seed).astype(np.int64)
            begins, ends = starts[chosen], starts[chosen + 1]
            for content in _gather(file.fileno(), begins * writer.dtype.itemsize, ends * writer.dtype.itemsize):
                writer.add_tokens(np.frombuffer(content, dtype=writer.dtype))
            writer.add_lengths((ends - begins).astype(np.int32))
    assert writer.num_tokens == num_tokens, "a permutation has each document once"
    tokens_path.unlink()
    starts_path.unlink()


def _gather(file: int, begins: np.ndarray, ends: np.ndarray) -> Iterator[bytes]:
    """Bytes of a file from each begin to its end, some megabytes at a time."""
    pending: list[bytes] = []
    size = 0
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        for at in range(begin, end, _BYTES_PER_READ):
            pending.append(os.pread(file, min(_BYTES_PER_READ, end - at), at))
            size += len(pending[-1])
            if size >= _BYTES_PER_READ:
                yield b"".join(pending)
                pending, size = [], 0
    yield b"".join(pending)
