"""Small parallel sizes that keep each kind of neighbour that a rank of a large run has; no torch here."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.errors import ConfigError
from megagpt.plan import Plan
from megagpt.plan.wording import or_list

AXES = ("tensor", "pipeline", "context", "data", "expert")


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes; ranks are tensor x pipeline x context x data."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    """Of the context x data ranks."""
    secondary: int = 1
    """Ranks over which ZeRO++ cuts the weights a second time (hpZ)."""
    groups: int = 1
    """Key/value heads, which some tensor-parallel ranks share if there are fewer of them."""

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def neighbours(self) -> frozenset[str]:
        """Kinds of neighbours, and pairs of kinds that one rank has."""
        axes = [f"{axis} parallel" for axis in AXES if getattr(self, axis) > 1]
        gradients = self.context * self.data
        kinds = {
            "a stage between two others": self.pipeline > 2,
            "copies of experts": 1 < self.expert < gradients,
            "experts over context- and data-parallel ranks": 1 < self.context < self.expert,
            "weights cut twice by hpZ": 1 < self.secondary < gradients,
            "weights cut by hpZ": self.secondary > 1,
            "key/value heads that some tensor-parallel ranks share": 1 < self.groups < self.tensor,
        }
        pairs = [" with ".join(pair) for pair in itertools.combinations(axes, 2)]
        return frozenset([*axes, *pairs, *(kind for kind, is_there in kinds.items() if is_there)])


def sizes_of(plan: Plan) -> Sizes:
    """Those of a run."""
    return Sizes(
        plan.tensor_parallel_size,
        plan.pipeline_parallel_size,
        plan.context_parallel_size,
        plan.data_parallel_size,
        plan.expert_parallel_size,
        plan.deepspeed.secondary_partition_size,
        plan.model.num_query_groups,
    )


def small_sizes(full: Sizes, max_ranks: int) -> tuple[list[Sizes], list[str]]:
    """As few small layouts as are needed to have each kind of neighbour, and each pair of kinds, in one of them.

    Args:
        full: sizes of the run.
        max_ranks: of each small layout.

    Returns:
        The layouts, the one with most in it first, and what no layout of so few ranks has.

    Raises:
        ConfigError: none of them has any of it.
    """
    wanted = set(full.neighbours)
    candidates = [sizes for sizes in _candidates(full) if sizes.ranks <= max_ranks and sizes.neighbours <= wanted]
    chosen: list[Sizes] = []
    while wanted:
        best = max(candidates, key=lambda sizes: (len(sizes.neighbours & wanted), len(sizes.neighbours), -sizes.ranks))
        if not best.neighbours & wanted:
            break
        chosen.append(best)
        wanted -= best.neighbours
    if full.neighbours and not chosen:
        raise ConfigError(
            f"--max-ranks={max_ranks} is too few for {or_list(sorted(full.neighbours & _axes()))} ranks; allow at "
            "least 2"
        )
    return chosen or [Sizes(groups=full.groups)], sorted(wanted)


def _axes() -> set[str]:
    return {f"{axis} parallel" for axis in AXES}


def _candidates(full: Sizes) -> list[Sizes]:
    """All small layouts; with two ranks of each kind, or as many as a kind of neighbour takes."""
    shares = 1 < full.groups < full.tensor
    choices = (
        _up_to(full.tensor, 4 if shares else 2),
        range(1, min(full.pipeline, 3) + 1),
        _up_to(full.context, 2),
        _up_to(full.data, 4 if full.expert > 1 or full.secondary > 1 else 2),
        _up_to(full.expert, 4),
        _up_to(full.secondary, 2),
    )
    found = []
    for tensor, pipeline, context, data, expert, secondary in itertools.product(*choices):
        gradients = context * data
        if gradients % expert or gradients % secondary:
            continue
        groups = min(full.groups, max(1, tensor // 2)) if full.groups < full.tensor else max(full.groups, tensor)
        found.append(Sizes(tensor, pipeline, context, data, expert, secondary, groups))
    return found


def _up_to(size: int, most: int) -> Sequence[int]:
    """1, 2 and 4, as far as they go."""
    return [small for small in (1, 2, 4) if small <= min(size, most)]
