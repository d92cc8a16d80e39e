"""Safetensors files written one tensor at a time, so that memory holds one tensor and not a shard.

Layout: header length (u64, little-endian), JSON header padded with spaces to a multiple of 8, then the tensors' bytes
without gaps in the header's order; each header entry is {"dtype", "shape", "data_offsets": [begin, end]}.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megagpt.errors import ConversionError
from megagpt.host_tensors import CHUNK_BYTES, bytes_of
from megagpt.storage.local import EarlySync

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


def plan_shards(shapes: Shapes, dtype: torch.dtype, max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut tensors, in their order, into shards of at most `max_shard_bytes`; a larger tensor has a shard of its own.

    Raises:
        ConversionError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes < 1:
        raise ConversionError(f"max_shard_bytes={max_shard_bytes} must be at least 1; the usual value is 5000000000")
    shards: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = shape
        room -= size
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers expects them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_safetensors(
    path: Path, shapes: Shapes, dtype: torch.dtype | Mapping[str, torch.dtype], make: Callable[[str], Iterable[Tensor]]
) -> WrittenFile:
    """Write one safetensors file and force it to disk.

    Args:
        path: file to create; an existing one is an error.
        shapes: names and shapes, in the order of the file.
        dtype: float32, bfloat16 or float16, of all tensors or by name; they are rounded to it.
        make: gives the tensor of a name in consecutive blocks of its rows; called once per name, in order.

    Raises:
        ConversionError: a value is not finite, or not in `dtype`'s range.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, dtypes = 0, dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": _CODES[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb", buffering=0) as file, _Sha256() as digest:
        early = EarlySync(file.fileno())
        for part in (struct.pack("<Q", len(encoded)), encoded):
            digest.update(memoryview(part))
            early.wrote(_write(file, memoryview(part)))
        for name, shape in shapes.items():
            rows = 0
            for block in make(name):
                assert block.shape[1:] == shape[1:], name
                rows += block.shape[0]
                for data in _rounded(name, block, dtypes[name]):
                    digest.update(data)
                    early.wrote(_write(file, data))
                digest.wait()
                del data, block  # frees it before the next one is made
            assert rows == shape[0], name
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    assert size == 8 + len(encoded) + end
    return WrittenFile(size, digest.hexdigest())


class _Sha256:
    """A hash that is computed in a thread of its own, while its caller writes what is hashed and makes what comes next.

    It takes longer than reading, rounding and writing together, and needs no lock of the interpreter.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "sha256")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def update(self, data: memoryview) -> None:
        """Begin to hash `data`, which must stay as it is until the next `update` or `wait` returns."""
        self.wait()
        self._last = self._thread.submit(self._digest.update, data)

    def wait(self) -> None:
        """Wait for what was begun."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def hexdigest(self) -> str:
        self.wait()
        return self._digest.hexdigest()


def _write(file: FileIO, data: memoryview) -> int:
    count = len(data)
    while len(data):
        data = data[file.write(data) :]
    return count


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """A tensor's bytes after rounding to `dtype`, a piece at a time; each is valid until the next but one."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    step = CHUNK_BYTES // dtype.itemsize
    memory, other = (torch.empty(min(step, flat.numel()), dtype=dtype) for _ in range(2))
    for part in flat.split(step):
        memory, other = other, memory
        rounded = part if part.dtype == dtype else memory[: len(part)].copy_(part)
        if not is_finite(rounded):
            raise _not_finite(name, flat, dtype)
        yield bytes_of(rounded)


def _not_finite(name: str, flat: Tensor, dtype: torch.dtype) -> ConversionError:
    if is_finite(flat):
        return ConversionError(
            f"{name} has the value {float(flat.abs().max()):g}, beyond the range of "
            f"{str(dtype).removeprefix('torch.')}; export as bfloat16 or float32"
        )
    return ConversionError(f"{name} has values that are not finite; the run diverged, export an earlier checkpoint")


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. Not-a-number passes through minimum and maximum, which need no copy."""
    return not tensor.numel() or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))
