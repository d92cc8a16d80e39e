"""What to change after a rank has run out of memory: the change nearest to what was asked that is estimated to fit."""

import dataclasses
import time
from collections.abc import Iterator

from megagpt.plan.config import RunConfig
from megagpt.plan.deepspeed_config import DeepSpeedConfig, deepspeed_config_from_dict
from megagpt.plan.nearest import layout_of, layout_words, passing_layouts, with_layout
from megagpt.plan.plan import Plan, make_plan
from megagpt.plan.rules import check_all

SEARCH_SECONDS = 10.0
GIB = 1 << 30
Change = tuple[str, RunConfig, DeepSpeedConfig]


def nearest_that_fits(plan: Plan, limit: int) -> str:
    """Words for the least change to a run whose rank is estimated to need at most `limit` bytes.

    A smaller micro-batch changes nothing but the speed, recomputing layers likewise, so they are tried before other
    layouts of as many ranks.

    Args:
        plan: what has run out of memory.
        limit: bytes per rank that the estimate may come to.
    """
    deadline = time.monotonic() + SEARCH_SECONDS
    for words, run, deepspeed in _changes(plan):
        if time.monotonic() > deadline:
            return (
                f"no change that is estimated to fit into {limit / GIB:.2f} GiB per rank was found in "
                f"{SEARCH_SECONDS:.0f} s; tools/plan.py shows what others need"
            )
        if check_all(run, deepspeed, plan.world_size):
            continue
        changed = make_plan(run, deepspeed, plan.world_size)
        if changed.memory.total <= limit:
            return f"nearest change that is estimated to fit ({changed.memory.total / GIB:.2f} GiB per rank): {words}"
    return (
        f"no layout of {plan.world_size} ranks is estimated to fit into {limit / GIB:.2f} GiB per rank; take more "
        "ranks, offload (zero_optimization.offload_optimizer) or a smaller model"
    )


def offloaded(plan: Plan) -> int:
    """Bytes of host memory that ZeRO's offload takes on a rank of the stage that has most of them."""
    return max(estimate.host for estimate in plan.memory_per_stage)


def less_on_the_host(plan: Plan) -> str:
    """Words for the ways to need less of a host's memory, beside GPUs or for what is not at work.

    Args:
        plan: what takes too much.
    """
    host = offloaded(plan)
    ways = ["take more hosts, or fewer ranks on each"]
    if host:
        ways.append(f"switch off offload (zero_optimization, {host / GIB:.2f} GiB per rank)")
    if copied := plan.save_copy_bytes:
        ways.append(f"save without a copy (checkpoint.asynchronous=false, {copied / GIB:.2f} GiB per rank)")
    return "; or ".join(ways)


def _changes(plan: Plan) -> Iterator[Change]:
    run, deepspeed = plan.run, plan.deepspeed
    recomputing = run.model_copy(update={"training": run.training.model_copy(update={"recompute_granularity": "full"})})
    recompute = "training.recompute_granularity=full"
    micro = plan.microbatch_size // 2
    while micro:
        words = f"train_micro_batch_size_per_gpu={micro} (JSON)"
        smaller = _with_microbatch(plan, micro)
        yield words, run, smaller
        yield f"{words} {recompute}", recomputing, smaller
        if micro * 2 == plan.microbatch_size:
            yield recompute, recomputing, deepspeed
        micro //= 2
    if plan.microbatch_size == 1:
        yield recompute, recomputing, deepspeed
    asked = layout_of(run, deepspeed)
    smallest = _with_microbatch(plan, 1)
    for more, base, json in (("", run, deepspeed), (f"{recompute} ", recomputing, smallest)):
        if more and plan.microbatch_size > 1:
            more += "train_micro_batch_size_per_gpu=1 (JSON) "
        for layout in passing_layouts(base, json, plan.world_size):
            yield more + layout_words(asked, layout, plan.world_size), *with_layout(base, json, layout)


def _with_microbatch(plan: Plan, size: int) -> DeepSpeedConfig:
    """The same global batch in smaller micro-batches."""
    raw = {key: value for key, value in plan.deepspeed.raw.items() if key != "gradient_accumulation_steps"}
    raw |= {"train_batch_size": plan.global_batch_size, "train_micro_batch_size_per_gpu": size}
    config = deepspeed_config_from_dict(raw, source=plan.deepspeed.source)
    return dataclasses.replace(config, source=plan.deepspeed.source)
