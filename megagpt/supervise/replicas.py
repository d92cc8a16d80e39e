"""Find silent corruption: the weights that data-parallel ranks have in common must be the same to the last bit.

ZeRO gives every rank the same updated weights, so that a difference before the next update is a flipped bit or a broken
transfer.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.launchers import host_name
from megagpt.parallel.ranks import Ranks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing_replicas(parameters: Mapping[str, Any], ranks: Ranks) -> tuple[str, dict[int, str]] | None:
    """Which ranks' copy of which parameter differs from the others', in words, and the hosts by these ranks; the same
    on all ranks. Collective.

    Args:
        parameters: this rank's, by name; those that ZeRO 3 cuts have no copies and are left out.
        ranks: this process's place.
    """
    shared = {name: value for name, value in parameters.items() if not hasattr(value, "ds_id")}
    if ranks.gradient_size == 1 or not shared:
        found: list[tuple[str, list[int]]] = []
    else:
        found = _differences(shared, ranks)
    if not ranks.any(bool(found)):
        return None
    hosts = ranks.gather_objects((host_name(), found))
    named = dict.fromkeys((name, tuple(odd)) for _, part in hosts for name, odd in part)
    odd_ranks = sorted({rank for _, odd in named for rank in odd})
    where = ", ".join(f"rank {rank} on {hosts[rank][0]}" for rank in odd_ranks)
    names = ", ".join(dict.fromkeys(name for name, _ in named))
    text = f"the weights of {where} differ from those of their data-parallel copies ({names})"
    return text, {rank: hosts[rank][0] for rank in odd_ranks}


def _differences(shared: Mapping[str, Any], ranks: Ranks) -> list[tuple[str, list[int]]]:
    """Parameters whose copies differ, with the global ranks of the fewer ones (all, if there is no majority)."""
    mine = torch.stack([_checksum(value) for value in shared.values()])
    rows = [torch.empty_like(mine) for _ in range(ranks.gradient_size)]
    dist.all_gather(rows, mine, group=ranks.gradient_group)
    table = torch.stack(rows)
    members = dist.get_process_group_ranks(ranks.gradient_group)
    found = []
    for column, (name, value) in enumerate(shared.items()):
        # Data-parallel ranks that share the experts have different ones.
        ways = ranks.expert_size if getattr(value, "allreduce", True) is False else 1
        for first in range(ways):
            sums = table[first::ways, column].tolist()
            if len(set(sums)) > 1:
                (usual, count), *_ = Counter(sums).most_common()
                is_majority = count * 2 > len(sums)
                odd = [members[first + ways * i] for i, s in enumerate(sums) if s != usual or not is_majority]
                found.append((name, odd))
    return found


@torch.no_grad()
def _checksum(parameter: Tensor) -> Tensor:
    """Sum of the bits taken as integers: a single flipped bit always changes it."""
    return parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64)
