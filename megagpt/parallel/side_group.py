"""Ranks that talk beside training: a group on the hosts' network, for threads that may not touch training's groups."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

SIDE_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for the slowest one; one that has died is noticed at once."""


class SideGroup:
    """All ranks, on the CPU; made by all of them together, used by one thread at a time.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int):
        self._world_size = world_size
        self._group: Any = dist.new_group(backend="gloo", timeout=SIDE_TIMEOUT) if world_size > 1 else None

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank.

        Raises:
            RuntimeError: a rank has died.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values
