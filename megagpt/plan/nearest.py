"""The layout nearest to one that breaks a rule: found by trying candidates against all rules, whatever they are."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from megagpt.plan.config import RunConfig
from megagpt.plan.deepspeed_config import DeepSpeedConfig
from megagpt.plan.layout import divisors
from megagpt.plan.rules import check_all, check_batch

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
    kept changes by the smallest factor. Problems that a plain run on one rank has too are no matter of the
    layout: they are left aside.

    Args:
        run: a run config that breaks a rule.
        deepspeed: its companion.
        world_size: number of ranks, which is not changed.

    Returns:
        Keys and values, or that there is no such layout; None if the layout is not what stands in the way.
    """
    asked = layout_of(run, deepspeed)
    plain: Layout = {key: 1 for key in asked if key in SIZES}
    plain |= {"sequence_parallel": False, "pipeline_partition": "uniform", "zero_stage": min(deepspeed.zero_stage, 1)}
    plain_run, plain_deepspeed = with_layout(run, deepspeed, plain)
    batch = check_batch(plain_run, plain_deepspeed, 1)  # does depend on the layout
    others = set(check_all(plain_run, plain_deepspeed, 1)) - set(batch)
    if world_size < 1 or set(_problems(run, deepspeed, asked, world_size)) <= others:
        return None
    for layout in sorted(candidate_layouts(asked, world_size), key=lambda layout: distance(asked, layout)):
        if set(_problems(run, deepspeed, layout, world_size)) <= others:
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


def _problems(run: RunConfig, deepspeed: DeepSpeedConfig, layout: Layout, world_size: int) -> list[str]:
    """What a layout breaks of all rules."""
    return check_all(*with_layout(run, deepspeed, layout), world_size)


def candidate_layouts(asked: Layout, world_size: int) -> Iterator[Layout]:
    """Every layout of `world_size` ranks; without repetition."""
    keys = [key for key in SIZES if key in asked]
    partitions = dict.fromkeys([asked["pipeline_partition"], "uniform"])
    stages = dict.fromkeys([asked["zero_stage"], 1, 2, 3])
    for sizes in _factors(keys, world_size):
        for zero_stage, sequence, partition in itertools.product(stages, (False, True), partitions):
            switches = {"zero_stage": zero_stage, "sequence_parallel": sequence, "pipeline_partition": partition}
            yield {**sizes, **switches}


def _factors(keys: list[str], world_size: int) -> Iterator[dict[str, int]]:
    """Sizes such that those of one replica multiply to a divisor of the number of ranks."""
    for values in itertools.product(divisors(world_size), repeat=len(keys)):
        sizes = dict(zip(keys, values, strict=True))
        if world_size % math.prod(sizes[key] for key in keys if key in REPLICA_SIZES) == 0:
            yield sizes


def distance(asked: Layout, layout: Layout) -> tuple[float, ...]:
    """How far a layout is from what was asked, the most important difference first.

    Sizes differ by their ratio; of equally far ones the smaller is nearer.
    """
    sizes = [key for key in SIZES if key in asked]
    return (
        *itertools.chain.from_iterable((abs(math.log2(layout[key] / asked[key])), layout[key]) for key in sizes),
        abs(layout["zero_stage"] - asked["zero_stage"]),
        layout["zero_stage"],
        layout["sequence_parallel"] != asked["sequence_parallel"],
        layout["pipeline_partition"] != asked["pipeline_partition"],
    )


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
