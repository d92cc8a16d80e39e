"""Large files, local or in an object store: reading parts of them into memory, and writing them in one go."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from megagpt.storage import filesystem
from megagpt.storage.filesystem import call, within, worded
from megagpt.storage.location import Location, RemotePath

_LOCAL_BYTES = 1 << 20
"""Read at once: still in the processor's cache when it is hashed."""
_REMOTE_BYTES = 64 << 20
"""Read at once from a store, as requests of the next size side by side."""
_REQUEST_BYTES = 8 << 20
"""Of one request."""
_AHEAD_BYTES = 2 << 20
"""Read at least, where small reads follow each other."""
_MOST_PARTS = 9000
"""S3 knows 10,000 parts of a file."""
_DISCARD_SECONDS = 10.0
"""Wait for a store to forget a file that could not be written: it may be why."""


class Ranges(Protocol):
    """A file that is open for reading parts of it, by any number of threads."""

    size: int
    chunk_bytes: int
    """Most that one call reads."""

    def read_into(self, memory: memoryview, offset: int) -> int:
        """Fill memory, or a first part of it, from the file.

        Args:
            memory: writable bytes.
            offset: of the first byte in the file.

        Returns:
            Bytes read; 0 at the end of the file.

        Raises:
            OSError: the file cannot be read.
            StorageError: the store refuses or does not answer.
        """
        ...

    def close(self) -> None:
        """Give up what is held for it."""
        ...


def open_ranges(path: Location) -> Ranges:
    """Open a file to read parts of it.

    Raises:
        OSError: it cannot be read; FileNotFoundError if it is not there.
        StorageError: the store refuses or does not answer.
    """
    return RemoteRanges(path) if isinstance(path, RemotePath) else LocalRanges(path)


class LocalRanges:
    """A local file."""

    chunk_bytes = _LOCAL_BYTES

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, memory: memoryview, offset: int) -> int:
        """See `Ranges`."""
        return os.preadv(self._descriptor, [memory[: self.chunk_bytes]], offset)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


class RemoteRanges:
    """A file in an object store. Small reads that follow each other are served from one larger one."""

    chunk_bytes = _REMOTE_BYTES

    def __init__(self, path: RemotePath):
        self._url = path.url
        self.size = path.size()
        self._ahead = 0, b""  # offset and content; replaced as one, so that threads see what belongs together
        self._expected = -1

    def read_into(self, memory: memoryview, offset: int) -> int:
        """See `Ranges`."""
        memory = memory[: min(self.chunk_bytes, max(self.size - offset, 0))]
        start, content = self._ahead
        if start <= offset < start + len(content):
            found = content[offset - start : offset - start + len(memory)]
            memory[: len(found)] = found
            self._expected = offset + len(found)
            return len(found)
        follows, self._expected = offset == self._expected, offset + len(memory)
        if follows and 0 < len(memory) < _AHEAD_BYTES:
            content = self._fetch(offset, min(offset + _AHEAD_BYTES, self.size))[0]
            self._ahead = offset, content
            memory[: len(content)] = content[: len(memory)]
            return min(len(content), len(memory))
        done = 0
        for part in self._fetch(offset, offset + len(memory)) if len(memory) else []:
            memory[done : done + len(part)] = part
            done += len(part)
        return done

    def _fetch(self, start: int, stop: int) -> list[bytes]:
        starts = list(range(start, stop, _REQUEST_BYTES))
        if len(starts) == 1:
            return [call(self._url, "cat_file", self._url, start=start, end=stop)]
        stops = [*starts[1:], stop]
        return call(self._url, "cat_ranges", [self._url] * len(starts), starts, stops, on_error="raise")

    def close(self) -> None:
        """Free what was read ahead."""
        self._ahead = 0, b""


def sha256_of(path: Location) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
        StorageError: the store refuses or does not answer.
    """
    ranges, digest, done = open_ranges(path), hashlib.sha256(), 0
    memory = memoryview(bytearray(min(ranges.chunk_bytes, max(ranges.size, 1))))
    try:
        while count := ranges.read_into(memory, done):
            digest.update(memory[:count])
            done += count
    finally:
        ranges.close()
    return digest.hexdigest()


@contextlib.contextmanager
def upload(path: RemotePath, size: int) -> Iterator[Callable[[memoryview], int]]:
    """What writes to a file in an object store, from its start on; it is there once the block has ended, or not at all.

    Args:
        path: the file; replaced if it exists.
        size: how large it will be, in bytes. Memory holds one or two parts of it at a time.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    part = max(2 * _REQUEST_BYTES, -(-size // _MOST_PARTS))
    pending = bytearray()

    def send(action: Callable[[], Any]) -> None:
        with worded(path.url):
            within(filesystem.WHOLE_SECONDS, action)

    def write(data: memoryview) -> int:
        pending.extend(data)
        if len(pending) >= part:
            send(lambda: file.write(pending))
            pending.clear()
        return len(data)

    with worded(path.url):
        file = filesystem.filesystem(path.url).open(path.url, "wb", block_size=part)
    try:
        yield write
        send(lambda: (file.write(pending), file.close()))
    except BaseException:
        with contextlib.suppress(Exception):  # the first error counts; the next save has the parts forgotten
            within(_DISCARD_SECONDS, file.discard)
        file.closed = True  # or its end would publish what there is of it
        raise
