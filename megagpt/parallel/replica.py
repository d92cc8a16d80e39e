"""The ranks that share the samples of a data-parallel rank, and how samples come from the first of them to the others.

What is said here goes over gloo groups of its own, in the thread that reads ahead: training's groups and streams are
not touched, and no step waits for it.
"""

import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan

_TIMEOUT = timedelta(hours=24)
"""How long ranks wait for each other: as long as a step, an evaluation or a save; a dead one is noticed at once."""
_numbers = itertools.count()


class Channel:
    """Brings samples to the ranks of a data-parallel replica that need them; used by one thread at a time.

    Made by all ranks of the job, in the same order if there are several.

    Args:
        plan: says who reads, and who needs samples.
        ranks: this process's place.
    """

    def __init__(self, plan: Plan, ranks: Ranks):
        members = plan.sample_ranks(ranks.data_rank)
        shares = plan.run.data.read_by == "leaders"
        self.needs_samples = ranks.rank in members
        """Whether this rank takes any micro-batch."""
        self.reads = self.needs_samples and (not shares or ranks.rank == members[0])
        """Whether this rank reads them itself."""
        self.has_others = shares and self.needs_samples and len(members) > 1
        """Whether what is read is sent to others."""
        number = next(_numbers)
        name = f"samples/{number}/of-{ranks.data_rank}"
        self._replica = _SideGroup(name, members, ranks.rank) if self.has_others else None
        place = members.index(ranks.rank) if self.needs_samples else 0
        readers = [plan.sample_ranks(data_rank)[place] for data_rank in range(plan.data_parallel_size)]
        sums = self.reads and plan.run.data.masks_loss and len(readers) > 1
        self._readers = _SideGroup(f"samples/{number}/at-{place}", readers, ranks.rank) if sums else None

    def broadcast(self, tensor: Tensor) -> None:
        """The leader's tensor, of one size on all ranks of the replica that need samples.

        Raises:
            RuntimeError: a rank has died.
        """
        assert self._replica is not None, "there are others"
        self._replica.broadcast(tensor)

    def broadcast_text(self, text: str) -> str:
        """The leader's text.

        Raises:
            RuntimeError: a rank has died.
        """
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor(len(content))
        self.broadcast(size)
        if len(content) != size:  # not the leader's
            content = torch.zeros(int(size), dtype=torch.uint8)
        self.broadcast(content)
        return bytes(content.tolist()).decode()

    def sum(self, number: int) -> int:
        """The sum of a number over the readers of all replicas.

        Raises:
            RuntimeError: a rank has died.
        """
        if self._readers is None:
            return number
        total = torch.tensor(number)
        self._readers.add_up(total)
        return int(total)


class _SideGroup:
    """Some ranks, on the hosts' network.

    Made by these ranks alone: `new_group` is for all ranks of the job, each of which would make the groups of all
    replicas, of which a large job has very many.

    Args:
        name: the same on all of them, and used once in a job.
        members: their global ranks, in the same order on all of them.
        rank: this process's.
    """

    def __init__(self, name: str, members: Sequence[int], rank: int):
        store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        self._group: Any = dist.ProcessGroupGloo(store, members.index(rank), len(members), _TIMEOUT)

    def broadcast(self, tensor: Tensor) -> None:
        """The first member's tensor."""
        self._group.broadcast(tensor, 0).wait()

    def add_up(self, tensor: Tensor) -> None:
        """The sum of all members' tensors."""
        self._group.allreduce([tensor]).wait()
