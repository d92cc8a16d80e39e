"""Where a rank's micro-batches come from: it reads them, or the first rank of its replica does and sends them.

Shapes: B samples of a micro-batch, S sequence.
"""

from collections.abc import Iterator
from typing import NoReturn, Protocol

import torch

from megagpt.data.loader import Marks, MicroBatch, eval_batches, num_eval_batches, train_batches
from megagpt.data.mixture import Samples
from megagpt.data.prefetch import Prefetched
from megagpt.errors import DataError, MegagptError, exit_code_of
from megagpt.plan import Plan

_MICRO_BATCH, _END, _ERROR = range(3)


class Channel(Protocol):
    """See `megagpt.parallel.replica`."""

    needs_samples: bool
    reads: bool
    has_others: bool

    def broadcast(self, tensor: torch.Tensor) -> None: ...
    def broadcast_text(self, text: str) -> str: ...
    def sum(self, number: int) -> int: ...


class Supply:
    """Micro-batches of one rank.

    Args:
        plan: batch, sample options, and who reads.
        data_rank: which part of each global batch is this rank's.
        device: where they go.
        training, evaluation: ways to the other ranks of the replica; each is used by one thread.
    """

    def __init__(self, plan: Plan, data_rank: int, device: torch.device, training: Channel, evaluation: Channel):
        self._plan, self._data_rank, self._device = plan, data_rank, device
        self._training, self._evaluation = training, evaluation

    def training(self, stream: Samples, first_sample: int) -> Prefetched:
        """Endless micro-batches from a sample of the run on; to be used as a context.

        Args:
            stream: the samples, read on ranks that read.
            first_sample: samples that the run has consumed before.
        """
        channel = self._training
        batches = train_batches(
            stream,
            first_sample=first_sample,
            global_batch_size=self._plan.global_batch_size,
            microbatch_size=self._plan.microbatch_size,
            data_parallel_rank=self._data_rank,
            data_parallel_size=self._plan.data_parallel_size,
            marks=self._marks(channel),
        )
        return self._brought(batches, channel)

    def evaluation(self, stream: Samples, num_batches: int) -> Prefetched:
        """The micro-batches of an evaluation, the same ones each time; to be used as a context.

        Args:
            stream: the samples, read on ranks that read, unshuffled.
            num_batches: global batches at most; see `num_eval_batches`.
        """
        channel = self._evaluation
        batches = eval_batches(
            stream,
            num_batches=num_batches,
            global_batch_size=self._plan.global_batch_size,
            microbatch_size=self._plan.microbatch_size,
            data_parallel_rank=self._data_rank,
            data_parallel_size=self._plan.data_parallel_size,
            marks=self._marks(channel),
        )
        return self._brought(batches, channel)

    def num_eval_batches(self, stream: Samples, num_batches: int) -> int:
        """Global batches of an evaluation of at most `num_batches`."""
        return num_eval_batches(stream, num_batches, self._plan.global_batch_size)

    def _marks(self, channel: Channel) -> Marks:
        data = self._plan.run.data
        return Marks(data.marks_documents, data.masks_loss, channel.sum)

    def _brought(self, batches: Iterator[MicroBatch], channel: Channel) -> Prefetched:
        ahead, others = self._plan.run.data.prefetch, False
        if not channel.needs_samples:
            batches, ahead = iter(()), 0
        elif channel.has_others:
            batches = sent(batches, channel, self._layout) if channel.reads else received(channel, self._layout)
            # Stages take the same micro-batch at different times, and must not wait for each other here.
            if self._plan.pipeline_parallel_size > 1:
                ahead += self._plan.pipeline_parallel_size
            others = True
        elif channel.reads and self._plan.run.data.masks_loss:
            others = self._plan.data_parallel_size > 1
        return Prefetched(batches, ahead, self._device, collective=others)

    @property
    def _layout(self) -> "Layout":
        data = self._plan.run.data
        return Layout(self._plan.microbatch_size, self._plan.seq_length, data.marks_documents, data.masks_loss)


class Layout:
    """A micro-batch as one tensor: [kind, loss_tokens, tokens, labels, places], int64.

    Args:
        samples, length: B and S.
        documents, loss: see `Marks`.
    """

    def __init__(self, samples: int, length: int, documents: bool, loss: bool):
        self._shape, self._documents, self._loss = (samples, length), documents, loss

    def empty(self) -> torch.Tensor:
        """What a micro-batch is received in."""
        samples, length = self._shape
        return torch.zeros(2 + (3 if self._documents else 2) * samples * length, dtype=torch.int64)

    def pack(self, batch: MicroBatch) -> torch.Tensor:
        """A micro-batch as a tensor."""
        packed = self.empty()
        packed[0] = _MICRO_BATCH
        if batch.loss_tokens is not None:
            packed[1:2] = batch.loss_tokens.double().view(1).view(torch.int64)
        parts = [batch.tokens_BS, batch.labels_BS, *([] if batch.places_BS is None else [batch.places_BS])]
        torch.cat([part.flatten() for part in parts], out=packed[2:])
        return packed

    def unpack(self, packed: torch.Tensor) -> MicroBatch:
        """The micro-batch of a tensor."""
        loss_tokens = packed[1:2].view(torch.float64)[0].float() if self._loss else None
        tokens_BS, labels_BS, *places_BS = packed[2:].view(-1, *self._shape)
        return MicroBatch(tokens_BS, labels_BS, places_BS[0] if places_BS else None, loss_tokens)


def sent(batches: Iterator[MicroBatch], channel: Channel, layout: Layout) -> Iterator[MicroBatch]:
    """Give micro-batches on, each after it was sent to the others; so are the end, and what goes wrong."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            channel.broadcast(_notice(layout, _END))
            return
        except (MegagptError, OSError) as error:
            channel.broadcast(_notice(layout, _ERROR, exit_code_of(error)))
            channel.broadcast_text(str(error))
            raise
        channel.broadcast(layout.pack(batch))
        yield batch


def received(channel: Channel, layout: Layout) -> Iterator[MicroBatch]:
    """The micro-batches that `sent` sends.

    Raises:
        DataError: those that were to come could not be read.
    """
    while True:
        packed = layout.empty()
        channel.broadcast(packed)
        kind = int(packed[0])
        if kind == _END:
            return
        if kind == _ERROR:
            _fail(channel.broadcast_text(""), int(packed[1]))
        yield layout.unpack(packed)


def _notice(layout: Layout, kind: int, exit_code: int = 0) -> torch.Tensor:
    packed = layout.empty()
    packed[0], packed[1] = kind, exit_code
    return packed


def _fail(reason: str, exit_code: int) -> NoReturn:
    raise DataError(f"the rank that reads for this one could not: {reason}", exit_code)
