"""Safetensors files whose every tensor carries its hash, so that what is read is checked while it is read.

Layout: header length (u64, little-endian), JSON header padded with spaces to a multiple of 8, then the tensors' bytes
without gaps in the header's order. Each header entry is {"dtype", "shape", "data_offsets": [begin, end]}, and
`__metadata__` maps `xxh3/NAME` to the XXH3-128 of the tensor's bytes. The manifest keeps the hash of the header, which
thereby stands for the whole file.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megagpt.checkpoint.manifest import File
from megagpt.errors import CheckpointError
from megagpt.host_tensors import CHUNK_BYTES, bytes_of, read_elements
from megagpt.storage import Location, RemotePath
from megagpt.storage.transfer import open_ranges, upload

_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_TYPES = {code: dtype for dtype, code in _CODES.items()}
_HASH = "xxh3/"
_NO_HASH = "0" * 32
_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, cut off, changed or not the one that was saved."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    bytes: int
    xxh3: str


def write_tensors(path: Location, tensors: Mapping[str, Tensor], make: Callable[[str], Tensor] | None = None) -> File:
    """Write a file and have it on the disk; memory holds one tensor at a time if they come from a device.

    Args:
        path: the file; replaced if it exists.
        tensors: floating point, int64 or uint8, on any device.
        make: gives each tensor when its turn comes, twice for a remote file, which need last only until the next one;
            those of `tensors` then only say type and shape.

    Raises:
        OSError: it cannot be written.
        StorageError: the store refuses or does not answer.
    """

    def content(name: str) -> memoryview:
        data = bytes_of((tensors[name] if make is None else make(name)).detach().cpu().contiguous())
        assert len(data) == tensors[name].numel() * tensors[name].element_size(), name
        return data

    header: dict[str, Any] = {"__metadata__": {"format": "pt", **{_HASH + name: _NO_HASH for name in tensors}}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    start = len(_encoded(header))
    if isinstance(path, RemotePath):
        encoded = _write_remote(path, header, start + end, content)
    else:
        encoded = _write_local(path, header, content)
    assert len(encoded) == start  # only the digits of the hashes have changed
    return File(bytes=start + end, header_xxh3=xxhash.xxh3_128_hexdigest(encoded))


def _write_local(path: Path, header: dict[str, Any], content: Callable[[str], memoryview]) -> bytes:
    """Write a file in one pass, the header with the hashes last; returns the header."""
    path.unlink(missing_ok=True)  # whoever reads the old one keeps it
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    write = partial(os.write, descriptor)
    try:
        os.lseek(descriptor, len(_encoded(header)), os.SEEK_SET)
        for name in _names(header):
            header["__metadata__"][_HASH + name] = _write_all(write, content(name))
        encoded = _encoded(header)
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write_all(write, memoryview(encoded))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return encoded


def _write_remote(path: RemotePath, header: dict[str, Any], size: int, content: Callable[[str], memoryview]) -> bytes:
    """Write an object, which goes from its start to its end: hashes are taken before; returns the header."""
    for name in _names(header):
        header["__metadata__"][_HASH + name] = xxhash.xxh3_128_hexdigest(content(name))
    encoded = _encoded(header)
    with upload(path, size) as write:
        _write_all(write, memoryview(encoded))
        for name in _names(header):
            _write_all(write, content(name))
    return encoded


def _names(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """About the size of the file that `write_tensors` would write, from above."""
    return sum(tensor.numel() * tensor.element_size() + 256 + 2 * len(name) for name, tensor in tensors.items())


class TensorFile:
    """A file of `write_tensors`, open for reading.

    Args:
        path: the file.
        expected: what the manifest says about it.

    Raises:
        DamagedError: it is missing, of another size, or its header is not the one that was saved.
        StorageError: here as in all methods: the store refuses or does not answer.
    """

    def __init__(self, path: Location, expected: File):
        self.path = path
        self._verified: set[str] = set()
        try:
            self._ranges = open_ranges(path)
        except OSError as error:
            raise DamagedError(f"{path}: {'missing' if error.errno == 2 else error.strerror}") from None
        try:
            self.entries = self._read_header(expected)
            """The tensors by name, in the file's order."""
        except BaseException:
            self._ranges.close()
            raise

    def __del__(self) -> None:
        if hasattr(self, "entries"):
            self._ranges.close()

    @property
    def is_verified(self) -> bool:
        """Whether every tensor has been read and its hash compared."""
        return len(self._verified) == len(self.entries)

    def _read_header(self, expected: File) -> dict[str, Entry]:
        path, size = self.path, self._ranges.size
        if size != expected.bytes:
            raise DamagedError(f"{path}: {size} bytes, {expected.bytes} expected: truncated or replaced")
        start = self._bytes(8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise DamagedError(f"{path}: the header is longer than the file: damaged, or not ours")
        text = self._bytes(length, 8)
        if xxhash.xxh3_128_hexdigest(start + text) != expected.header_xxh3:
            raise DamagedError(f"{path}: the hash of its header differs from the manifest's: changed or replaced")
        return parse_header(path, text, 8 + length, size)

    def _bytes(self, count: int, offset: int) -> bytes:
        memory, done = memoryview(bytearray(count)), 0
        while done < count and (more := self._ranges.read_into(memory[done:], offset + done)):
            done += more
        return bytes(memory[:done])

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """One tensor, after its hash has been compared.

        Args:
            name: of the tensor.
            out: contiguous tensor on the CPU with as many elements, of any type, to read into; default: a new one.

        Returns:
            The tensor; `out` if that was given.

        Raises:
            DamagedError: there is no such tensor, it cannot be read or its content has changed.
        """
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype) if out is None else out
        assert tensor.numel() == prod(entry.shape), name
        digest = xxhash.xxh3_128()
        self._read(name, entry.begin, entry.dtype, tensor, digest.update)
        self._require_same(name, digest.hexdigest())
        return tensor

    def read_part(self, name: str, first: int, out: Tensor) -> None:
        """Some elements of a tensor, after the hash of all of it has been compared, once.

        Args:
            name: of the tensor.
            first: its first element that is wanted.
            out: contiguous tensor on the CPU, of any type, to fill.

        Raises:
            DamagedError: as for `read`.
        """
        entry = self._entry(name)
        if name not in self._verified and out.numel() == prod(entry.shape):
            self.read(name, out)
            return
        if name not in self._verified:
            self._compare(name)
        self._read(name, entry.begin + first * entry.dtype.itemsize, entry.dtype, out)

    def verify_rest(self) -> None:
        """Read and compare what has not been read yet, in little memory.

        Raises:
            DamagedError: something has changed.
        """
        for name in self.entries:
            if name not in self._verified:
                self._compare(name)

    def _compare(self, name: str) -> None:
        """Compare the hash of a tensor, of which nothing is kept."""
        entry, digest = self._entry(name), xxhash.xxh3_128()
        step = self._ranges.chunk_bytes
        memory = torch.empty(min(step, entry.bytes), dtype=torch.uint8)
        for done in range(0, entry.bytes, step):
            chunk = memory[: entry.bytes - done]
            self._read(name, entry.begin + done, torch.uint8, chunk, digest.update)
        self._require_same(name, digest.hexdigest())

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise DamagedError(f"{self.path}: {name} is missing; the file is not ours")
        return self.entries[name]

    def _read(
        self,
        name: str,
        offset: int,
        dtype: torch.dtype,
        out: Tensor,
        seen: Callable[[memoryview], object] = lambda chunk: None,
    ) -> None:
        try:
            whole = read_elements(self._ranges.read_into, offset, dtype, out, seen, self._ranges.chunk_bytes)
        except OSError as error:
            raise DamagedError(f"{self.path}: {name}: not readable ({error.strerror})") from None
        if not whole:
            raise DamagedError(f"{self.path}: ends within {name}: truncated")

    def _require_same(self, name: str, xxh3: str) -> None:
        if xxh3 != self.entries[name].xxh3:
            raise DamagedError(f"{self.path}: {name}: the hash differs from what was saved: the content has changed")
        self._verified.add(name)


def parse_header(path: Location, text: bytes, start: int, size: int) -> dict[str, Entry]:
    """The tensors that a header tells of.

    Args:
        path: of the file, for messages.
        text: the JSON.
        start: offset of the first tensor's bytes.
        size: of the file.

    Raises:
        DamagedError: it is no such header, or the tensors do not fill the file without gaps.
    """

    def problem(what: str) -> DamagedError:
        return DamagedError(f"{path}: header: {what}; the file is not ours")

    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise problem("not JSON") from None
    hashes = tree.pop("__metadata__", None) if isinstance(tree, dict) else None
    if not isinstance(hashes, dict):
        raise problem("has no __metadata__")
    entries, end = {}, 0
    for name, entry in tree.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise problem(f"{name}: is not dtype, shape and data_offsets")
        dtype = _TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        shape, offsets = entry["shape"], entry["data_offsets"]
        if dtype is None or not _are_sizes(shape) or not _is_span(offsets):
            raise problem(f"{name}: dtype={entry['dtype']!r}, shape={shape!r}, data_offsets={offsets!r}")
        if offsets != [end, end + prod(shape) * dtype.itemsize]:
            raise problem(f"{name}: data_offsets={offsets} do not follow {end} by the size of {shape}")
        xxh3 = hashes.get(_HASH + name)
        if not isinstance(xxh3, str):
            raise problem(f"{name}: has no hash")
        entries[name] = Entry(dtype, tuple(shape), start + end, offsets[1] - end, xxh3)
        end = offsets[1]
    if start + end != size:
        raise problem(f"its tensors end at byte {start + end} of {size}")
    return entries


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        return False
    return len(values) <= 8 and prod(max(value, 1) for value in values) < 1 << 62


def _is_span(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 2 and all(type(value) is int for value in values)


def _encoded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_all(write: Callable[[memoryview], int], data: memoryview) -> str:
    """Write all of it; the XXH3-128 of what was written."""
    digest = xxhash.xxh3_128()
    for begin in range(0, len(data), CHUNK_BYTES):
        chunk = data[begin : begin + CHUNK_BYTES]
        digest.update(chunk)
        while len(chunk):
            chunk = chunk[write(chunk) :]
    return digest.hexdigest()
