"""The layout nearest to one that breaks a rule: found by trying candidates against all rules, whatever they are."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

from megagpt.plan.config import RunConfig
from megagpt.plan.deepspeed_config import DeepSpeedConfig
from megagpt.plan.layout import divisors
from megagpt.plan.rules import broken_rules, check_all, check_batch

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
"""Keys of `parallel` that count ranks, in the order in which one would rather keep them."""
REPLICA_SIZES = SIZES[:3]
"""Those that make up one replica of the model; experts are spread over data-parallel ranks."""

Layout = dict[str, Any]
"""Keys of `parallel`, and `zero_stage`."""


def nearest_layout(run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int) -> str | None:
    """Words for the layout of as many ranks that passes all rules and changes least of what was asked for.

    TP is kept rather than PP, PP rather than other sizes, and those rather than the ZeRO stage; a size that cannot be
    kept changes by the smallest factor, of equally far ones to the smaller. Problems that remain in a plain run are no
    matter of the layout: they are left aside.

    Args:
        run: a run config that breaks a rule.
        deepspeed: its companion.
        world_size: number of ranks, which is not changed.

    Returns:
        Keys and values, or that there is no such layout; None if the layout is not what stands in the way.
    """
    if world_size < 1:
        return None
    asked = layout_of(run, deepspeed)
    problems, plain = set(check_all(run, deepspeed, world_size)), _plain(asked)
    others = problems & _problems_but_batch(run, deepspeed, plain, world_size)
    if problems <= others:
        return None
    for layout in passing_layouts(run, deepspeed, world_size, others):
        words = layout_words(asked, layout, world_size)
        return f"nearest layout of {_ranks(world_size)} that passes all rules: {words}"
    return f"no layout of {_ranks(world_size)} passes all rules; change the number of ranks, the batch or the model"


def layout_of(run: RunConfig, deepspeed: DeepSpeedConfig) -> Layout:
    """What a run asks for."""
    parallel = run.parallel
    sizes = {key: getattr(parallel, key) for key in SIZES if hasattr(parallel, key)}
    return {
        **sizes,
        "zero_stage": deepspeed.zero_stage,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_partition": parallel.pipeline_partition,
    }


def with_layout(run: RunConfig, deepspeed: DeepSpeedConfig, layout: Layout) -> tuple[RunConfig, DeepSpeedConfig]:
    """Both configs with another layout."""
    parallel = {key: value for key, value in layout.items() if key != "zero_stage"}
    run = run.model_copy(update={"parallel": run.parallel.model_copy(update=parallel)})
    if layout["zero_stage"] != deepspeed.zero_stage:
        zero = {**deepspeed.raw.get("zero_optimization", {}), "stage": layout["zero_stage"]}
        raw = {**deepspeed.raw, "zero_optimization": zero}
        deepspeed = dataclasses.replace(deepspeed, raw=raw, zero_stage=layout["zero_stage"])
    return run, deepspeed


def passing_layouts(
    run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int, others: Set[str] = frozenset()
) -> Iterator[Layout]:
    """Every layout of `world_size` ranks that passes all rules, the nearest to that of the run first.

    Args:
        others: problems that are left aside.
    """
    asked = layout_of(run, deepspeed)
    switches = list(_switches(asked))

    def passes(layout: Layout, rules: Callable[..., Iterable[str]]) -> bool:
        return all(problem in others for problem in rules(*with_layout(run, deepspeed, layout), world_size))

    sizes = {key: _possible_sizes(run, deepspeed, key, world_size) for key in asked if key in SIZES}
    for values in itertools.product(*sizes.values()):
        chosen = dict(zip(sizes, values, strict=True))
        if world_size % math.prod(chosen[key] for key in REPLICA_SIZES if key in chosen):
            continue
        if not passes(chosen | switches[0], check_batch):
            continue  # nor does it with other switches
        yield from (chosen | switch for switch in switches if passes(chosen | switch, broken_rules))


def _switches(asked: Layout) -> Iterator[Layout]:
    """ZeRO stage, sequence parallelism and partition of the stages, the nearest to those asked for first."""
    asked_stage, asked_sequence = asked["zero_stage"], asked["sequence_parallel"]
    stages = sorted({asked_stage, 1, 2, 3}, key=lambda stage: (abs(stage - asked_stage), stage))
    partitions = dict.fromkeys([asked["pipeline_partition"], "uniform"])
    for stage, sequence, partition in itertools.product(stages, (asked_sequence, not asked_sequence), partitions):
        yield {"zero_stage": stage, "sequence_parallel": sequence, "pipeline_partition": partition}


def _possible_sizes(run: RunConfig, deepspeed: DeepSpeedConfig, key: str, world_size: int) -> list[int]:
    """Sizes that break no rule where all other sizes are 1, the nearest to that of the run first.

    A size that breaks one there breaks it in any layout; but how many samples a step has is up to all of them.
    """
    asked = layout_of(run, deepspeed)
    switches = [_plain(asked) | switch for switch in _switches(asked)]
    before = set().union(*(_problems_but_batch(run, deepspeed, layout, world_size) for layout in switches))
    nearest_first = sorted(divisors(world_size), key=lambda size: (abs(math.log2(size / asked[key])), size))
    return [
        size
        for size in nearest_first
        if any(_problems_but_batch(run, deepspeed, layout | {key: size}, world_size) <= before for layout in switches)
    ]


def _plain(asked: Layout) -> Layout:
    """All ranks are data parallel."""
    sizes = {key: 1 for key in asked if key in SIZES}
    switches = {"sequence_parallel": False, "pipeline_partition": "uniform", "zero_stage": min(asked["zero_stage"], 1)}
    return {**sizes, **switches}


def _problems_but_batch(run: RunConfig, deepspeed: DeepSpeedConfig, layout: Layout, world_size: int) -> set[str]:
    run, deepspeed = with_layout(run, deepspeed, layout)
    return set(check_all(run, deepspeed, world_size)) - set(check_batch(run, deepspeed, world_size))


def layout_words(asked: Layout, layout: Layout, world_size: int) -> str:
    """The sizes above 1 or changed, then the switches that changed, as the user would write them."""
    always = SIZES[:2]
    sizes = {key: layout[key] for key in SIZES if key in layout}
    texts = [f"parallel.{key}={size}" for key, size in sizes.items() if key in always or size != asked[key] or size > 1]
    if layout["sequence_parallel"] or asked["sequence_parallel"]:
        texts.append(f"parallel.sequence_parallel={str(layout['sequence_parallel']).lower()}")
    if layout["pipeline_partition"] != asked["pipeline_partition"]:
        texts.append(f"parallel.pipeline_partition={layout['pipeline_partition']}")
    replicas = world_size // math.prod(size for key, size in sizes.items() if key in REPLICA_SIZES)
    texts.append(f"zero_optimization.stage={layout['zero_stage']} (JSON)")
    return f"{' '.join(texts)}, which leaves data parallel {replicas}"


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
