"""Micro-batches read ahead by a thread, so that a step does not wait for the disk."""

import queue
import threading
from collections.abc import Iterator

import torch

from megagpt.data.loader import MicroBatch

_END = object()


class Prefetched:
    """The same micro-batches in the same order, some of them read before they are asked for.

    What goes wrong in the thread is raised where the micro-batch that it concerns would have come. How far it has read
    is of no consequence to a resume, which counts the samples that were trained on. Use as a context, or `close` it.

    The thread reads `ahead` micro-batches more than were taken, and one in its hand. Where that means to talk to other
    ranks it reads them all even if it is closed before: then all ranks, which have taken as many, have said the same.
    """

    def __init__(
        self,
        batches: Iterator[MicroBatch],
        ahead: int,
        device: torch.device | None = None,
        collective: bool = False,
    ):
        """Begin to read.

        Args:
            batches: what is read; nobody else may take from it.
            ahead: micro-batches that wait at most; 0 reads each when it is asked for, without a thread.
            device: where they go; for a GPU they are put into pinned memory, from which copies do not stop the host.
            collective: whether other ranks read, or receive, the same number of micro-batches, and wait for this one.
        """
        self._batches, self._device, self._collective = batches, device, collective
        self._pins = device is not None and device.type == "cuda"
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._allowed, self._num_read = ahead + 1, 0
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._read_ahead, name="prefetch", daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._thread is None:
            return self._prepared(next(self._batches))
        if self._ended:
            raise StopIteration
        found = self._ready.get()
        if isinstance(found, tuple):
            with self._changed:
                self._allowed += 1
                self._changed.notify()
            return found  # type: ignore[return-value]
        self._ended = True  # nothing comes behind an end or an error
        if found is _END:
            raise StopIteration
        raise found

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error other ranks may be anywhere: the thread that waits for them ends with the process.
        self.close(waits=kind is None or not self._collective)

    def close(self, waits: bool = True) -> None:
        """End the thread, and wait until it has ended."""
        self._ended = True
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None and waits:
            self._thread.join()

    def _read_ahead(self) -> None:
        if self._pins:
            torch.cuda.set_device(self._device)  # a thread begins with the first GPU, which may be another rank's
        while self._may_read():
            found: object
            try:
                found = self._prepared(next(self._batches))
            except StopIteration:
                found = _END
            except BaseException as error:  # raised again where it belongs
                found = error
            self._ready.put(found)
            if not isinstance(found, tuple):
                return

    def _may_read(self) -> bool:
        """Wait until one more may be read; False if none is to be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._num_read < self._allowed)
            if self._closing and not (self._collective and self._num_read < self._allowed):
                return False
            self._num_read += 1
            return True

    def _prepared(self, batch: MicroBatch) -> MicroBatch:
        if not self._pins:
            return batch
        return MicroBatch._make(None if part is None else part.pin_memory() for part in batch)
