"""Every layout gives the loss curve and gradient norms of one process without DeepSpeed."""

import json

import pytest
from curves import Curve, train_plainly, train_under_deepspeed
from ranks import run_ranks
from tiny import ADAM, SGD, rank_batches, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

LAYOUTS_PER_PROCESS = 6
"""Starting a set of processes takes longer than a layout's steps; but one that fails takes its companions along."""


def reference_curves(plans) -> list[Curve]:
    """Curves of plain torch loops around the same models."""
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    return [reference_curve(plan) for plan in plans]


def reference_curve(plan) -> Curve:
    return train_plainly(plan)[0]


def engine_curves(plans) -> list[Curve]:
    """Curves of runs under DeepSpeed, one after the other on the same ranks."""
    from megatron.core import parallel_state

    curves = []
    for plan in plans:
        curves.append(engine_curve(plan))
        parallel_state.destroy_model_parallel()  # the processes stay together, only their layout changes
    return curves


def engine_curve(plan) -> Curve:
    return train_under_deepspeed(plan)[0]


# Model, optimizer and layout. Adam hides errors in the scale of gradients, so most use SGD with clipping.
LAYOUTS = [
    ("llama", ADAM, {}),
    ("llama", ADAM, {"tp": 2}),
    ("llama", ADAM, {"pp": 2}),
    ("llama", ADAM, {"dp": 2}),
    ("llama", ADAM, {"tp": 2, "pp": 2}),
    ("llama", SGD, {"tp": 2, "pp": 2}),
    ("llama", SGD, {"pp": 2, "dp": 2}),
    ("llama", SGD, {"tp": 2, "dp": 2}),
    ("llama", SGD, {"tp": 2, "dp": 2, "zero": 2}),
    ("llama", SGD, {"tp": 2, "dp": 2, "zero": 3}),
    ("llama", SGD, {"tp": 2, "pp": 2, "sp": True}),
    ("llama", SGD, {"tp": 2, "pp": 2, "recompute": {"recompute_granularity": "full"}}),
    ("llama", ADAM, {"cp": 2}),
    ("llama", SGD, {"cp": 2, "tp": 2}),
    ("llama", SGD, {"cp": 2, "tp": 2, "sp": True}),
    ("llama", SGD, {"cp": 2, "pp": 2}),
    ("llama", SGD, {"cp": 2, "dp": 2, "zero": 2}),
    ("llama", SGD, {"cp": 4, "zero": 3}),
    ("gpt2", ADAM, {"tp": 2, "pp": 2}),
    ("gpt2", SGD, {"tp": 2, "pp": 2}),
    ("gpt2", SGD, {"tp": 2, "sp": True}),
    ("gpt2", SGD, {"pp": 2, "dp": 2}),
    ("gpt2", SGD, {"cp": 2, "pp": 2}),
    ("gpt2", SGD, {"cp": 2, "tp": 2, "sp": True}),
    ("neox", SGD, {"tp": 2, "pp": 2}),
    ("gemma", SGD, {"tp": 2, "pp": 2}),
    ("gemma", SGD, {"tp": 2, "sp": True, "dp": 2}),
    ("qwen3", SGD, {"tp": 2}),
    ("qwen3", SGD, {"tp": 2, "sp": True, "dp": 2}),
    ("qwen3", ADAM, {"tp": 2, "pp": 2, "sp": True, "recompute": {"recompute_granularity": "selective"}}),
    ("odd", SGD, {"pp": 2, "partition": "parameters"}),
    ("odd-tied", ADAM, {"pp": 2, "partition": "parameters"}),
    ("one-group", SGD, {"tp": 2}),
    ("one-group", SGD, {"tp": 2, "sp": True}),
    ("one-group", ADAM, {"tp": 2, "pp": 2, "sp": True}),
    ("one-group", SGD, {"tp": 2, "dp": 2, "zero": 3}),
    ("one-group", SGD, {"tp": 2, "cp": 2}),
    ("two-groups", SGD, {"tp": 4}),
    ("two-groups", SGD, {"tp": 4, "sp": True}),
    ("5-layers", SGD, {"pp": 4, "partition": [1, 1, 2, 1]}),
    ("5-layers-tied", SGD, {"pp": 4, "partition": [1, 1, 2, 1]}),
    ("5-layers", ADAM, {"pp": 4, "partition": [1, 2, 2, 0]}),
    ("5-layers-tied", SGD, {"tp": 2, "pp": 2, "partition": [5, 0]}),
    ("neox", SGD, {"cp": 2}),
    ("qwen3", SGD, {"cp": 2, "tp": 2, "sp": True}),
]


def plan_of(shape: str, optimizer: dict, tp=1, pp=1, dp=1, partition="uniform", **layout):
    """The Plan of one of the LAYOUTS; `shape` is a key of MODELS or SHAPES."""
    sections = {"parallel": {"pipeline_partition": partition}}
    return tiny_plan(shape, optimizer, tp=tp, pp=pp, dp=dp, sections=sections, **layout)


@pytest.fixture(scope="module")
def references(libraries):
    """Reference curves by shape and optimizer."""
    keys = list(dict.fromkeys((shape, optimizer["name"]) for shape, optimizer, _ in LAYOUTS))
    optimizers = {"adamw": ADAM, "sgd": SGD}
    plans = [plan_of(shape, optimizers[name]) for shape, name in keys]
    return dict(zip(keys, run_ranks(reference_curves, 1, plans)[0], strict=True))


@pytest.fixture(scope="module")
def curves(libraries):
    """Curves of a layout on every rank. What follows it in LAYOUTS with as many ranks is run in the same processes."""
    found: dict[str, tuple[Curve, ...]] = {}

    def get(wanted: str) -> tuple[Curve, ...]:
        if wanted not in found:
            plans = {layout_key(*case): plan_of(*case[:2], **case[2]) for case in LAYOUTS}
            world_size = plans[wanted].world_size
            keys = [key for key in plans if key not in found and plans[key].world_size == world_size]
            batch = keys[keys.index(wanted) :][:LAYOUTS_PER_PROCESS]
            by_rank = run_ranks(engine_curves, world_size, [plans[key] for key in batch])
            found.update(zip(batch, zip(*by_rank, strict=True), strict=True))
        return found[wanted]

    return get


def layout_key(shape: str, optimizer: dict, layout: dict) -> str:
    return json.dumps([shape, optimizer["name"], layout])


def layout_id(value) -> str:
    if isinstance(value, str):
        return value
    return value["name"] if "name" in value else "-".join(f"{key}{size}" for key, size in value.items()) or "single"


@pytest.mark.parametrize(("shape", "optimizer", "layout"), LAYOUTS, ids=layout_id)
def test_layout_gives_the_single_process_curve(references, curves, shape, optimizer, layout):
    plan = plan_of(shape, optimizer, **layout)
    expected_losses, expected_norms = zip(*references[shape, optimizer["name"]], strict=True)
    found = curves(layout_key(shape, optimizer, layout))
    assert len(found) == plan.world_size
    for curve in found:
        losses, norms = zip(*curve, strict=True)
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert losses[-1] < losses[0] - 0.2, "the model must learn, or the comparison says little"


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"dp": 2, "zero": 2}, {"tp": 2, "zero": 3}], ids=layout_id)
def test_bf16_stays_near_the_fp32_curve(references, layout):
    plan = tiny_plan("llama", ADAM, precision="bf16", **layout)
    expected_losses, _ = zip(*references["llama", "adamw"], strict=True)
    for (curve,) in run_ranks(engine_curves, plan.world_size, [plan]):
        losses, _ = zip(*curve, strict=True)
        # bf16 keeps 8 bits: rounding moves a loss near 5 by some hundredths at most
        assert losses == pytest.approx(expected_losses, abs=0.05)


def reductions_by_one_rank(plan) -> tuple[int, bool]:
    """All-reduces of gradient size in one step of a single rank, and whether its 16-bit gradients outlive the step."""
    import torch.distributed as dist

    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    largest = max(parameter.numel() for parameter in engine.parameters.values())
    reduce, sizes = dist.all_reduce, []

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    engine.train_step(rank_batches(plan, 0, 0), plan.run.optimizer.lr)
    return sum(size > largest for size in sizes), any(p.grad is not None for p in engine.parameters.values())


def test_one_rank_sums_its_gradients_with_nobody(libraries):
    for precision in ("bf16", "fp32"):
        ((joined, kept),) = run_ranks(reductions_by_one_rank, 1, tiny_plan("llama", ADAM, precision=precision))
        assert joined == 0, "all gradients in one tensor"
        assert not kept
