"""Parts of remote files kept on a local disk, in bounded space, shared by the processes of a host.

    FOLDER/KEY/00000012.block   1 MiB of a file (less at its end) and its XXH3-64; KEY stands for URL and version
    FOLDER/KEY/whole            all of a file, for those that are mapped into memory
    FOLDER/lock                 held by whoever fetches a whole file or makes room

Files appear under their names when they are complete, so that readers need no lock. Blocks that were not used for the
longest time go first; whole files are not counted and stay.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from megagpt.errors import StorageError
from megagpt.storage.filesystem import call
from megagpt.storage.local import publish, temporary_name
from megagpt.storage.location import RemotePath
from megagpt.storage.transfer import open_ranges

BLOCK_BYTES = 1 << 20
"""Samples come in random order: a block is about what a store sends in the time that its answer takes anyway."""
_AT_ONCE = 16
"""Blocks that are fetched side by side where many are missing."""
_ROOM_INTERVAL = 64
"""Blocks that a process writes until it looks how large the cache has become."""
_TOUCH_SECONDS = 60.0
"""How old the note of a block's last use may become."""
_DIGEST = struct.Struct("<Q")


class Cache:
    """A folder of cached parts.

    Args:
        folder: on a disk of this host; None: one of this user's in the system's folder for temporary files.
        most_bytes: that blocks may take, all files together.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int = 20_000_000_000):
        self.folder = folder or Path(tempfile.gettempdir()) / f"megagpt-cache-{os.getuid()}"
        self.most_bytes = most_bytes
        self._written = 0

    def prepare(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            StorageError: it cannot be made, or belongs to somebody else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            is_ours = self.folder.stat().st_uid == os.getuid()
        except OSError as error:
            raise StorageError(f"{self.folder}: {error.strerror}; give another data.cache_directory") from None
        if not is_ours:  # whoever owns it could put other content there
            raise StorageError(f"{self.folder} belongs to another user; give another data.cache_directory")

    def whole(self, path: RemotePath, sha256: str | None = None) -> Path:
        """A local copy of a file; fetched by one process of the host while the others wait.

        Args:
            path: the file.
            sha256: of its content; None: not known.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: the store or the local disk fails, or the content is another one.
        """
        self.prepare()
        final = self.folder / _key(path) / "whole"
        with self._locked():
            if final.exists() and final.stat().st_size == path.size():
                return final
            try:
                final.parent.mkdir(exist_ok=True)
                self._fetch_whole(path, final, sha256)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and error.filename == path.url:
                    raise
                raise StorageError(
                    f"{final}: cannot be written ({error.strerror}); free space, or give another data.cache_directory"
                ) from None
        return final

    def _fetch_whole(self, path: RemotePath, final: Path, sha256: str | None) -> None:
        ranges, temporary, digest, done = open_ranges(path), temporary_name(final), hashlib.sha256(), 0
        memory = memoryview(bytearray(min(ranges.chunk_bytes, max(ranges.size, 1))))
        try:
            with temporary.open("wb") as file:
                while count := ranges.read_into(memory, done):
                    file.write(memory[:count])
                    digest.update(memory[:count])
                    done += count
                file.flush()
                os.fsync(file.fileno())
            if done != ranges.size or sha256 not in (None, digest.hexdigest()):
                raise StorageError(
                    f"{path} has sha256 {digest.hexdigest()}, {sha256} was expected; the file was damaged or replaced"
                )
            publish(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def make_room(self) -> None:
        """Remove the blocks that were not used for the longest time, until a tenth of the limit is free."""
        with self._locked():
            blocks = []
            for entry in self.folder.glob("*/*.block"):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    blocks.append((status.st_mtime, status.st_size, entry))
            total = sum(size for _, size, _ in blocks)
            if total <= self.most_bytes:
                return
            for _, size, entry in sorted(blocks):
                entry.unlink(missing_ok=True)
                total -= size
                if total <= 0.9 * self.most_bytes:
                    break

    def note_written(self, blocks: int) -> None:
        """Count blocks that were added, and look after the limit now and then."""
        self._written += blocks
        if self._written >= min(_ROOM_INTERVAL, max(1, self.most_bytes // BLOCK_BYTES // 4)):
            self._written = 0
            self.make_room()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class CachedFile:
    """A remote file that is read through a cache, by any number of threads.

    Args:
        path: the file.
        cache: where parts of it are kept.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: here as in `read`: the store refuses or does not answer.
    """

    def __init__(self, path: RemotePath, cache: Cache):
        cache.prepare()
        self.size = path.size()
        self._url, self._cache = path.url, cache
        self._folder = cache.folder / _key(path)
        self._folder.mkdir(exist_ok=True)
        self._used: dict[int, float] = {}  # blocks whose hash was compared -> when their use was noted

    def read(self, start: int, memory: memoryview) -> None:
        """Fill memory with the bytes of the file from `start` on; they must be inside it."""
        stop = start + len(memory)
        assert 0 <= start <= stop <= self.size
        wanted = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) if memory else range(0)
        missing = []
        for block in wanted:
            first, last = self._part(block, start, stop)
            if not self._read_block(block, first, memory[block * BLOCK_BYTES + first - start :][: last - first]):
                missing.append(block)
        for begin in range(0, len(missing), _AT_ONCE):
            blocks = missing[begin : begin + _AT_ONCE]
            for block, content in zip(blocks, self._fetch(blocks), strict=True):
                first, last = self._part(block, start, stop)
                memory[block * BLOCK_BYTES + first - start :][: last - first] = content[first:last]
                self._keep(block, content)
            self._cache.note_written(len(blocks))

    def _part(self, block: int, start: int, stop: int) -> tuple[int, int]:
        """Which bytes of a block are wanted."""
        return max(start - block * BLOCK_BYTES, 0), min(stop - block * BLOCK_BYTES, BLOCK_BYTES)

    def _length(self, block: int) -> int:
        return min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)

    def _name(self, block: int) -> Path:
        return self._folder / f"{block:08d}.block"

    def _read_block(self, block: int, first: int, memory: memoryview) -> bool:
        """Read a part of a block from the disk; False if it is not there, or not what was put there."""
        length = self._length(block)
        try:
            descriptor = os.open(self._name(block), os.O_RDONLY)
        except OSError:
            return False
        try:
            if block not in self._used:  # a host may have lost its power while the block was written
                content = os.pread(descriptor, length + _DIGEST.size + 1, 0)
                if content[length:] != _DIGEST.pack(xxhash.xxh3_64_intdigest(content[:length])):
                    return False
            if os.preadv(descriptor, [memory], first) != len(memory):
                return False
            now = time.monotonic()
            if now - self._used.get(block, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
                self._used[block] = now
                with contextlib.suppress(OSError):
                    os.utime(descriptor)
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _fetch(self, blocks: list[int]) -> list[bytes]:
        starts = [block * BLOCK_BYTES for block in blocks]
        stops = [start + self._length(block) for block, start in zip(blocks, starts, strict=True)]
        if len(blocks) == 1:
            found = [call(self._url, "cat_file", self._url, start=starts[0], end=stops[0])]
        else:
            found = call(self._url, "cat_ranges", [self._url] * len(blocks), starts, stops, on_error="raise")
        for content, start, stop in zip(found, starts, stops, strict=True):
            if len(content) != stop - start:
                raise StorageError(f"{self._url}: {len(content)} bytes came instead of {stop - start}: it was replaced")
        return found

    def _keep(self, block: int, content: bytes) -> None:
        """Put a block on the disk; if there is no room, it is fetched again next time."""
        name = self._name(block)
        temporary = temporary_name(name)
        try:
            temporary.write_bytes(content + _DIGEST.pack(xxhash.xxh3_64_intdigest(content)))
            os.replace(temporary, name)
        except OSError:
            temporary.unlink(missing_ok=True)


def _key(path: RemotePath) -> str:
    """A name for this version of a file."""
    return hashlib.sha256(f"{path.url} {path.version()}".encode()).hexdigest()[:32]
