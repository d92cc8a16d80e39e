"""fp16: near the fp32 curve, and an overflow anywhere skips the step everywhere."""

import math

import pytest
import torch
from ranks import run_ranks
from tiny import ADAM, SGD, rank_batches, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

STEPS = 10
SCALING = {"initial_scale_power": 10, "hysteresis": 2, "loss_scale_window": 3}


def fp16_plan(model="llama", optimizer=SGD, precision="fp16", steps=STEPS, offload="none", **layout):
    deepspeed: dict = {"zero_optimization": {"offload_optimizer": {"device": offload}}}
    if precision == "fp16":
        deepspeed["fp16"] = SCALING
    return tiny_plan(model, optimizer, precision=precision, steps=steps, deepspeed=deepspeed, **layout)


def results(plan, overflowing_steps=(), overflowing_rank=0) -> list[tuple[float, float, float | None, bool]]:
    """Loss, norm, scale and whether skipped, per step; one weight's gradient is made infinite on one rank at times."""
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    step = 0

    def overflow(grad: torch.Tensor) -> torch.Tensor:
        return grad * math.inf if step in overflowing_steps and ranks.rank == overflowing_rank else grad

    weight = next(p for name, p in engine.parameters.items() if name.endswith("linear_proj.weight"))
    weight.register_hook(overflow)
    values = []
    for step in range(plan.run.training.steps):
        result = engine.train_step(rank_batches(plan, ranks.data_rank, step), plan.run.optimizer.lr)
        values.append((float(result.loss), float(result.grad_norm), result.loss_scale, result.skipped))
    return values


@pytest.fixture(scope="module")
def exact(libraries):
    cache = {}

    def get(model, optimizer):
        key = (model, optimizer["name"])
        if key not in cache:
            cache[key] = run_ranks(results, 1, fp16_plan(model, optimizer, precision="fp32"))[0]
        return cache[key]

    return get


LAYOUTS = [
    ("gpt2", ADAM, {"tp": 2, "pp": 2}),
    ("gpt2", SGD, {"tp": 2, "pp": 2}),  # tied embeddings, whose gradients are summed over the stages
    ("gpt2", SGD, {"pp": 2, "dp": 2}),
    ("llama", SGD, {"dp": 2, "zero": 1}),
    ("llama", SGD, {"tp": 2, "dp": 2, "zero": 2}),
    ("llama", SGD, {"tp": 2, "dp": 2, "zero": 3}),
]


def layout_id(value) -> str:
    if isinstance(value, str):
        return value
    return value["name"] if "name" in value else "-".join(f"{key}{size}" for key, size in value.items())


@pytest.mark.parametrize(("model", "optimizer", "layout"), LAYOUTS, ids=layout_id)
def test_fp16_stays_near_the_fp32_curve(exact, model, optimizer, layout):
    plan = fp16_plan(model, optimizer, **layout)
    expected = exact(model, optimizer)
    for values in run_ranks(results, plan.world_size, plan):
        # fp16 keeps 11 bits: with fp32 sums and masters, what rounding moves stays within some thousandths
        assert [v[0] for v in values] == pytest.approx([v[0] for v in expected], abs=2e-3)
        assert [v[1] for v in values] == pytest.approx([v[1] for v in expected], rel=5e-3)
        assert not any(v[3] for v in values)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", {"tp": 2, "pp": 2}),
        ("gpt2", {"pp": 2, "offload": "cpu"}),
        ("llama", {"dp": 2, "zero": 1}),
        ("llama", {"dp": 2, "zero": 2, "offload": "cpu"}),
        ("llama", {"dp": 2, "zero": 3, "offload": "cpu"}),
        ("llama", {"tp": 2, "dp": 2, "zero": 2}),
        ("llama", {"tp": 2, "dp": 2, "zero": 3}),
    ],
    ids=layout_id,
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(model, layout):
    plan = fp16_plan(model, **layout)
    ranks = run_ranks(results, plan.world_size, plan, overflowing_steps=(1, 2), overflowing_rank=plan.world_size - 1)
    for values in ranks:
        assert values == ranks[0]
        assert [v[3] for v in values] == [False, True, True, *[False] * 7]
        # Two overflows use up the hysteresis and halve the scale; each third good step after the first doubles it.
        assert [v[2] for v in values] == [1024.0] * 3 + [512.0] * 4 + [1024.0] * 3
        assert [math.isinf(v[1]) for v in values] == [v[3] for v in values]
        assert all(math.isfinite(v[0]) for v in values)


def test_a_skipped_step_leaves_the_weights():
    def weights_after(steps: int, overflowing: tuple[int, ...]) -> dict[str, torch.Tensor]:
        from megagpt.engine import build_engine
        from megagpt.parallel.launch import detect_launch
        from megagpt.parallel.ranks import start_ranks

        plan = fp16_plan(dp=2, zero=2)
        ranks = start_ranks(plan, detect_launch())
        engine = build_engine(plan, ranks)
        step = 0
        for parameter in engine.parameters.values():
            parameter.register_hook(lambda grad: grad * math.nan if step in overflowing else grad)
        for step in range(steps):  # noqa: B007 - the hooks read it
            engine.train_step(rank_batches(plan, ranks.data_rank, 0), 0.1)
        return {f.name: f.master.clone() for f in engine.fragments()}

    for one, two in zip(run_ranks(weights_after, 2, 1, ()), run_ranks(weights_after, 2, 2, (1,)), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
