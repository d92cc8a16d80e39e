"""Read parts of tensors from safetensors files, straight into the tensor that is wanted.

Not mapped into memory: the pages of a mapped file count as the process's own, whatever part of them is used. The header
is checked before anything is read, so that a damaged or hostile file gives an error and no other tensor's bytes.
"""

import contextlib
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.errors import ConversionError
from megagpt.host_tensors import read_elements

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
_MAX_HEADER = 100_000_000  # as the safetensors library

Span = tuple[int, int]
"""First and one past the last index of a part of a dimension."""


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a header."""

    code: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""


class SafetensorsFile:
    """One file, opened for reading.

    Args:
        path: the file.

    Raises:
        ConversionError: it cannot be read, or is not a whole safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor.

        Raises:
            ConversionError: it is not a floating type that weights come in.
        """
        code = self.tensors[name].code
        if code not in _DTYPES:
            raise ConversionError(
                f"{self.path}: {name} is stored as {code}; only {', '.join(_DTYPES)} can be read, not quantised weights"
            )
        return _DTYPES[code]

    def read(
        self, name: str, rows: Span | None = None, columns: Span | None = None, out: Tensor | None = None
    ) -> Tensor:
        """A tensor, or a part of it.

        Args:
            name: a key of `tensors`.
            rows: part of the first dimension; None: all.
            columns: part of the second one, for matrices; None: all.
            out: contiguous tensor of that shape and any type to read into; default: a new one of the stored type.

        Raises:
            ConversionError: the file cannot be read (any more).
        """
        stored, dtype = self.tensors[name], self.dtype(name)
        first, last = rows or (0, stored.shape[0] if stored.shape else 1)
        rest = stored.shape[1:]
        row_bytes = math.prod(rest) * dtype.itemsize
        if columns is None or columns == (0, *rest):
            shape = (last - first, *rest) if stored.shape else ()
            part = torch.empty(shape, dtype=dtype) if out is None else out
            assert part.shape == shape, name
            self._read_into(part, dtype, stored.begin + first * row_bytes)
            return part
        shape = (last - first, columns[1] - columns[0])
        part = torch.empty(shape, dtype=dtype) if out is None else out
        assert part.shape == shape, name
        for row, line in enumerate(part):
            self._read_into(line, dtype, stored.begin + (first + row) * row_bytes + columns[0] * dtype.itemsize)
        return part

    def _read_into(self, tensor: Tensor, dtype: torch.dtype, offset: int) -> None:
        try:
            whole = read_elements(lambda view, at: os.preadv(self._descriptor, [view], at), offset, dtype, tensor)
        except OSError as error:
            raise ConversionError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not whole:
            raise ConversionError(
                f"{self.path}: ends before byte {offset + tensor.numel() * dtype.itemsize}; it was "
                "truncated while it was read"
            )

    def _damaged(self, what: str) -> ConversionError:
        return ConversionError(f"{self.path}: {what}: not a whole safetensors file; download or export it again")

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._descriptor).st_size
        start = os.pread(self._descriptor, 8, 0)
        if len(start) < 8:
            raise self._damaged(f"has {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _MAX_HEADER):
            raise self._damaged(f"announces a header of {length} bytes in a file of {size}")
        try:
            tree = json.loads(os.pread(self._descriptor, length, 8))
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not JSON ({error})") from None
        if not isinstance(tree, dict):
            raise self._damaged("its header is not an object")
        tree.pop("__metadata__", None)
        tensors, ends = dict[str, StoredTensor](), []
        for name, entry in tree.items():
            code, shape, (begin, end) = self._entry(name, entry)
            ends.append((begin, end))
            tensors[name] = StoredTensor(code, shape, 8 + length + begin)
        expected = 0
        for begin, end in sorted(ends):
            if begin != expected:
                raise self._damaged(f"its tensors leave a gap or overlap at byte {begin}")
            expected = end
        if 8 + length + expected != size:
            raise self._damaged(f"has {size} bytes, {8 + length + expected} expected")
        return tensors

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], Span]:
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            counts = [*shape, begin, end]
            good = isinstance(code, str) and all(type(n) is int and n >= 0 for n in counts) and begin <= end
        except (TypeError, KeyError, ValueError):
            good = False
        if not good:
            raise self._damaged(f"the entry of {name} is {str(entry)[:80]}")
        if code in _SIZES and math.prod(shape) * _SIZES[code] != end - begin:
            raise self._damaged(f"{name} has {end - begin} bytes for {code} of shape {shape}")
        return code, tuple(shape), (begin, end)
