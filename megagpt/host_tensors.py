"""Tensors in host memory: memory that is used again and again, and files read straight into it.

Fresh memory is dear: the system clears each page when it is first touched, which takes several times as long as reading
into it from the page cache. What handles one large tensor after another takes its memory from a `MemoryPool`.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20
"""Handled at once: still in the processor's cache when it is hashed or converted."""
_MIN_HUGE_BYTES = 1 << 22
_MIN_POOLED_BYTES = 1 << 20

ReadInto = Callable[[memoryview, int], int]
"""Fills memory, or a first part of it, with a file's bytes from an offset on; gives their number, 0 at the end."""


def host_memory(count: int, pinned: bool = False) -> Tensor:
    """`count` bytes of host memory as a uint8 vector; large ones in huge pages, where the first touch costs far less.

    Args:
        count: bytes.
        pinned: locked, for fast copies from a GPU.
    """
    if pinned:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    if count < _MIN_HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class MemoryPool:
    """Memory for tensors that come and go: what is given back serves the next ones. For one thread."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._used: dict[int, Tensor] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any content."""
        size = prod(shape) * dtype.itemsize
        if size < _MIN_POOLED_BYTES:
            return torch.empty(*shape, dtype=dtype)
        fitting = [memory for memory in self._free if memory.numel() >= size]
        if fitting:
            memory = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not memory]
        else:
            self._free.clear()  # too small for what comes now: better one large piece than many small ones
            memory = host_memory(size)
        self._used[memory.data_ptr()] = memory
        return memory[:size].view(dtype).view(*shape)

    def give_back(self, tensor: Tensor) -> None:
        """Have the memory of a tensor used again; nothing happens if it is not from here."""
        if (memory := self._used.pop(tensor.data_ptr(), None)) is not None:
            self._free.append(memory)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def read_elements(
    read_into: ReadInto,
    offset: int,
    dtype: torch.dtype,
    out: Tensor,
    seen: Callable[[memoryview], object] = lambda chunk: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> bool:
    """Fill a tensor from a file in one pass.

    Args:
        read_into: reads the file.
        offset: where the first element is in the file.
        dtype: type that the elements are stored in.
        out: contiguous, on the CPU; of another type than `dtype`, elements are converted.
        seen: told of all bytes as they are stored, one chunk after the other.
        chunk_bytes: most that is read at once.

    Returns:
        Whether all of it was there; False if the file ends before.
    """
    if out.dtype == dtype:
        view = bytes_of(out)
        return all(
            _fill(read_into, view[done : done + chunk_bytes], offset + done, seen)
            for done in range(0, len(view), chunk_bytes)
        )
    flat, step = out.view(-1), max(1, chunk_bytes // dtype.itemsize)
    chunk = torch.empty(min(step, flat.numel()), dtype=dtype)
    view = bytes_of(chunk)
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step]
        if not _fill(read_into, view[: len(part) * dtype.itemsize], offset + first * dtype.itemsize, seen):
            return False
        part.copy_(chunk[: len(part)])
    return True


def _fill(read_into: ReadInto, view: memoryview, offset: int, seen: Callable[[memoryview], object]) -> bool:
    while len(view):
        count = read_into(view, offset)
        if count == 0:
            return False
        seen(view[:count])
        view, offset = view[count:], offset + count
    return True


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread: for work on pieces so small that threads would mostly wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def round_in_place(tensor: Tensor, dtype: torch.dtype) -> None:
    """Round the values of a contiguous tensor to those of another type, a piece at a time."""
    if tensor.dtype == dtype:
        return
    for part in tensor.view(-1).split(CHUNK_BYTES // tensor.dtype.itemsize):
        part.copy_(part.to(dtype))
