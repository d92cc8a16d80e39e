"""One save at a time, beside training: copy the state aside, write it in a thread, tell all ranks how it went."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from megagpt.errors import TRY_AGAIN, CheckpointError
from megagpt.host_tensors import host_memory
from megagpt.parallel.consensus import Consensus
from megagpt.parallel.ranks import Ranks
from megagpt.parallel.side_group import SideGroup
from megagpt.storage import Location, RemotePath

_ALIGNMENT = 64


@dataclass(frozen=True)
class Saved:
    """A save that is complete."""

    folder: Location
    step: int
    seconds: float
    """From its start to its end."""
    stall: float
    """Seconds that training stood still for it."""


class Snapshot:
    """Host memory for one copy of this rank's state, used again for each save (locked for fast copies from a GPU)."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors on any device, which replace those of the last call.

        Copies from a GPU may still be under way: `torch.cuda.synchronize` before they are read.
        """
        sizes = [ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        if self._memory is None or self._memory.numel() < sum(sizes):
            self._memory = host_memory(sum(sizes), pinned=torch.cuda.is_available())
        copies, begin = {}, 0
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            place = self._memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[name] = place.copy_(tensor.detach(), non_blocking=True)
            begin += size
        return copies


class SaveFailedError(Exception):
    """A save has failed on some rank; all ranks raise it with the same words.

    Args:
        text: why.
        exit_code: of the process that this ends.
    """

    def __init__(self, text: str, exit_code: int = CheckpointError.exit_code):
        super().__init__(text)
        self.exit_code = exit_code


class Saves:
    """Runs saves, in a thread or at once, and lets all ranks learn of their end at the same step.

    Args:
        ranks: this process's place; making it is collective.
        on_saved: told of each save that is complete, by the thread that trains.
    """

    def __init__(self, ranks: Ranks, on_saved: Callable[[Saved], None]):
        self.on_saved = on_saved
        self.exchange = SideGroup(ranks.world_size)
        """For the save itself."""
        self._votes = Consensus(ranks, width=4)  # there was a vote, a rank writes, has failed, has failed for good
        self._rank = ranks.rank
        self._thread: threading.Thread | None = None
        self._failure: SaveFailedError | None = None
        self._saved: Saved | None = None

    @property
    def is_running(self) -> bool:
        """Whether the end of a save has not been told yet; the same on all ranks."""
        return self._thread is not None

    def start(self, work: Callable[[], None], folder: Location, step: int, started: float, in_thread: bool) -> None:
        """Begin a save; the one before must have ended.

        Args:
            work: writes the checkpoint, talking to other ranks through `exchange`.
            folder: where it will be.
            step: of the run.
            started: when the save began (`time.monotonic`).
            in_thread: return at once; else when it is done.

        Raises:
            CheckpointError: it failed (not `in_thread`).
        """
        assert self._thread is None, "one save at a time"
        self._failure, self._saved = None, None
        stall = time.monotonic() - started

        def run() -> None:
            try:
                work()
            except SaveFailedError as error:
                self._failure = error
            except Exception as error:  # a thread has nobody to raise to
                self._failure = SaveFailedError(f"rank {self._rank}: {type(error).__name__}: {error}")
            seconds = time.monotonic() - started
            self._saved = Saved(folder, step, seconds, stall if in_thread else seconds)

        self._folder = folder
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        if not in_thread:
            self.wait()

    def poll(self) -> None:
        """Between two steps: tell of a save that has ended on all ranks; collective while one is running.

        Raises:
            CheckpointError: it failed; on all ranks.
        """
        if self._thread is None:
            return
        has_voted, is_writing, *_ = self._votes.vote(1, self._thread.is_alive(), 0, 0)
        if has_voted and not is_writing:
            self._end()

    def wait(self) -> None:
        """Wait for the save that is running, if there is one; collective then.

        Raises:
            CheckpointError: it failed; on all ranks.
        """
        if self._thread is not None:
            self._end()

    def close(self) -> str | None:
        """Wait for the save that is running without talking to other ranks, for a run that breaks off.

        Returns:
            Why that save failed, if it did.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return None if self._failure is None else str(self._failure)

    def _end(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        self._votes.close()
        exit_code = 0 if self._failure is None else self._failure.exit_code
        _, _, has_failed, for_good = self._votes.now(1, 0, exit_code != 0, exit_code not in (0, TRY_AGAIN))
        if has_failed:
            why = self._failure or "see the messages of other ranks"
            advice = (
                "mend that, then" if isinstance(self._folder, RemotePath) else "free space or mend the folder, then"
            )
            if not for_good:
                advice = "this may pass by itself:"
            text = f"{self._folder}: could not be saved ({why}); {advice} start again"
            raise CheckpointError(text, None if for_good else TRY_AGAIN)
        assert self._saved is not None
        self.on_saved(self._saved)
