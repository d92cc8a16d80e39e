"""Parts of remote files on the local disk: right, bounded, shared, and never believed blindly."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megagpt.errors import StorageError
from megagpt.storage import RemotePath, cache, filesystem, location
from megagpt.storage.cache import BLOCK_BYTES, Cache, CachedFile

_numbers = itertools.count()
CONTENT = os.urandom(5 * BLOCK_BYTES + 1234)


@pytest.fixture
def remote() -> RemotePath:
    path = location(f"memory://bucket/cached-{next(_numbers)}/file")
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """Bytes of each request for content."""
    sizes: list[int] = []

    def counted(url: str, method: str, *args, **options):
        found = filesystem.call(url, method, *args, **options)
        if method in ("cat_file", "cat_ranges"):
            sizes.extend(map(len, found if isinstance(found, list) else [found]))
        return found

    monkeypatch.setattr(cache, "call", counted)
    return sizes


def read(file: CachedFile, start: int, count: int) -> bytes:
    memory = memoryview(bytearray(count))
    file.read(start, memory)
    return bytes(memory)


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.block"))


def test_any_part_is_right_and_fetched_once(remote, fetched, tmp_path):
    spans = [(0, 0), (5, 100), (BLOCK_BYTES - 3, 6), (10, 3 * BLOCK_BYTES), (len(CONTENT) - 7, 7), (0, len(CONTENT))]
    for start, count in spans:
        assert read(CachedFile(remote, Cache(tmp_path)), start, count) == CONTENT[start : start + count]
    assert sum(fetched) == len(CONTENT)
    read(CachedFile(remote, Cache(tmp_path)), 0, len(CONTENT))
    assert sum(fetched) == len(CONTENT)


def test_the_limit_holds_and_what_was_used_last_stays(remote, tmp_path):
    file = CachedFile(remote, Cache(tmp_path, most_bytes=3 * BLOCK_BYTES + 1000))
    for number in range(5):
        read(file, number * BLOCK_BYTES, 10)
        os.utime(blocks(tmp_path)[0], (1e9 + number, 1e9 + number))
        assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 3 * BLOCK_BYTES + 1000
    assert "00000004.block" in {path.name for path in blocks(tmp_path)}
    assert "00000000.block" not in {path.name for path in blocks(tmp_path)}
    assert read(file, 0, len(CONTENT)) == CONTENT


def test_a_block_that_was_damaged_is_fetched_again(remote, fetched, tmp_path):
    read(CachedFile(remote, Cache(tmp_path)), 0, len(CONTENT))
    first, second = blocks(tmp_path)[:2]
    damaged = bytearray(first.read_bytes())
    damaged[100] ^= 1
    first.write_bytes(damaged)
    second.write_bytes(second.read_bytes()[:-1])
    fetched.clear()
    assert read(CachedFile(remote, Cache(tmp_path)), 0, len(CONTENT)) == CONTENT
    assert fetched == [BLOCK_BYTES, BLOCK_BYTES]


def test_another_version_of_a_file_is_another_file(remote, tmp_path):
    read(CachedFile(remote, Cache(tmp_path)), 0, len(CONTENT))
    other = bytes(len(CONTENT))
    remote.write_bytes(other)
    assert read(CachedFile(remote, Cache(tmp_path)), 0, len(CONTENT)) == other


def test_a_disk_without_room_costs_time_only(remote, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = CachedFile(remote, Cache(tmp_path))
    monkeypatch.setattr(cache.os, "replace", full)
    assert read(file, 0, len(CONTENT)) == CONTENT
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_many_readers_do_not_harm_each_other(remote, tmp_path):
    files = [CachedFile(remote, Cache(tmp_path, most_bytes=2 * BLOCK_BYTES)) for _ in range(8)]

    def look(number: int) -> bool:
        start = number * 7919 * 41 % (len(CONTENT) - 5000)
        return read(files[number % 8], start, 5000) == CONTENT[start : start + 5000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(200)))


def test_a_whole_file_is_checked_and_fetched_once(remote, tmp_path, monkeypatch):
    import hashlib

    with pytest.raises(StorageError, match=f"file has sha256 {hashlib.sha256(CONTENT).hexdigest()}, 00 was expected"):
        Cache(tmp_path).whole(remote, "00")
    local = Cache(tmp_path).whole(remote, hashlib.sha256(CONTENT).hexdigest())
    assert local.read_bytes() == CONTENT
    monkeypatch.setattr(cache, "open_ranges", None)
    assert Cache(tmp_path).whole(remote) == local
    with pytest.raises(FileNotFoundError):
        Cache(tmp_path).whole(remote.with_name("other"))


def test_a_folder_of_somebody_else_is_refused(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StorageError, match=r"belongs to another user; give another data\.cache_directory"):
        Cache(tmp_path).whole(remote)
