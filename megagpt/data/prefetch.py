"""Micro-batches read ahead by a thread, so that a step does not wait for the disk."""

import queue
import threading
from collections.abc import Iterator

import torch

from megagpt.data.loader import MicroBatch

_WAIT_SECONDS = 0.1
_END = object()


class Prefetched:
    """The same micro-batches in the same order, some of them read before they are asked for.

    What goes wrong in the thread is raised where the micro-batch that it concerns would have come. How far it has read
    is of no consequence to a resume, which counts the samples that were trained on. Use as a context, or `close` it.
    """

    def __init__(self, batches: Iterator[MicroBatch], ahead: int, device: torch.device | None = None):
        """Begin to read.

        Args:
            batches: what is read; nobody else may take from it.
            ahead: micro-batches that wait at most; 0 reads each when it is asked for, without a thread.
            device: where they go; for a GPU they are put into pinned memory, from which copies do not stop the host.
        """
        self._batches, self._device = batches, device
        self._pins = device is not None and device.type == "cuda"
        self._ready: queue.Queue = queue.Queue(max(ahead, 1))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="prefetch", daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._thread is None:
            return self._prepared(next(self._batches))
        if self._closing.is_set():
            raise StopIteration
        found = self._ready.get()
        if isinstance(found, tuple):
            return found
        self._closing.set()  # nothing comes behind an end or an error
        if found is _END:
            raise StopIteration
        raise found

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and wait until it has ended."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _read_ahead(self) -> None:
        if self._pins:
            torch.cuda.set_device(self._device)  # a thread begins with the first GPU, which may be another rank's
        while not self._closing.is_set():
            found: object
            try:
                found = self._prepared(next(self._batches))
            except StopIteration:
                found = _END
            except BaseException as error:  # raised again where it belongs
                found = error
            self._put(found)
            if not isinstance(found, tuple):
                return

    def _put(self, found: object) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(found, timeout=_WAIT_SECONDS)
            except queue.Full:
                continue
            return

    def _prepared(self, batch: MicroBatch) -> MicroBatch:
        if not self._pins:
            return batch
        return MicroBatch(*(None if part is None else part.pin_memory() for part in batch))
