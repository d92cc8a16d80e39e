"""Ranks decide together at every step without waiting for each other or for the device.

A vote goes over gloo, between hosts, while the next step is computed; its result is read one step later. Nothing
touches the GPU, and the vote of a step has arrived long before it is asked for.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megagpt.parallel.ranks import Ranks


class Consensus:
    """The largest of a few small integers over all ranks, one step late.

    Args:
        ranks: this process's place; making this is collective.
        width: integers per vote.
        timeout: how long a vote may take: the slowest of steps, evaluations and saves.
    """

    def __init__(self, ranks: Ranks, width: int = 1, timeout: timedelta = timedelta(hours=24)):
        self._alone = ranks.world_size == 1
        self._group: Any = None if self._alone else dist.new_group(backend="gloo", timeout=timeout)
        self._width = width
        self._pending: tuple[Any, torch.Tensor] | None = None

    def now(self, *votes: int) -> list[int]:
        """The largest votes of all ranks, waiting for them."""
        values = self._tensor(votes)
        if not self._alone:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def vote(self, *votes: int) -> list[int]:
        """Hand in this step's votes; returns the largest ones of the step before, zeros at first.

        A rank alone has its own votes at once.
        """
        if self._alone:
            return list(votes)
        decided = self.close()
        values = self._tensor(votes)
        self._pending = (dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True), values)
        return decided

    def close(self) -> list[int]:
        """The votes still under way; to be read before the ranks part."""
        if self._pending is None:
            return [0] * self._width
        work, values = self._pending
        self._pending = None
        work.wait()
        return values.tolist()

    def _tensor(self, votes: tuple[int, ...]) -> torch.Tensor:
        assert len(votes) == self._width, "every rank hands in all votes"
        return torch.tensor(votes, dtype=torch.int64)
