"""Offload to host memory and ZeRO++ change nothing but where things are; sums of gradients have the type asked for."""

import pytest
from ranks import RankFailedError, run_ranks
from test_layouts import engine_curve, layout_id, reference_curves
from tiny import ADAM, SGD, micro_batch, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
EVERYTHING = {**OPTIMIZER, "offload_param": {"device": "cpu"}}
STEPS = 12


def plan_of(model, optimizer, zero_keys, *, steps=STEPS, zero=1, **layout):
    return tiny_plan(
        model, optimizer, zero=zero, steps=steps, deepspeed={"zero_optimization": zero_keys}, **layout
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(libraries):
    cache = {}

    def get(model, optimizer):
        key = (model, optimizer["name"])
        if key not in cache:
            cache[key] = run_ranks(reference_curves, 1, [tiny_plan(model, optimizer, steps=STEPS)])[0][0]
        return cache[key]

    return get


@pytest.mark.parametrize(
    ("model", "optimizer", "zero_keys", "layout"),
    [
        ("gpt2", SGD, OPTIMIZER, {"tp": 2, "pp": 2}),
        ("gpt2", ADAM, OPTIMIZER, {"pp": 2, "dp": 2}),
        ("llama", SGD, OPTIMIZER, {"tp": 2, "dp": 2, "zero": 2}),
        ("llama", SGD, EVERYTHING, {"tp": 2, "dp": 2, "zero": 3}),
        ("llama", ADAM, EVERYTHING, {"dp": 2, "zero": 3}),
        ("llama", SGD, {"zero_hpz_partition_size": 2}, {"dp": 4, "zero": 3}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and "name" not in value else layout_id(value),
)
def test_offload_gives_the_single_process_curve(reference, model, optimizer, zero_keys, layout):
    plan = plan_of(model, optimizer, zero_keys, **layout)
    expected_losses, expected_norms = zip(*reference(model, optimizer), strict=True)
    for curve in run_ranks(engine_curve, plan.world_size, plan):
        losses, norms = zip(*curve, strict=True)
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-5)


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.05), ("fp16", 5e-3)])
@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"dp": 2, "zero": 3}], ids=layout_id)
def test_offload_in_16_bits_stays_near_the_fp32_curve(reference, precision, error, layout):
    plan = plan_of("gpt2", ADAM, OPTIMIZER, precision=precision, steps=6, **layout)
    for curve in run_ranks(engine_curve, plan.world_size, plan):
        expected = reference("gpt2", ADAM)[: len(curve)]
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], abs=error)
        assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in expected], rel=10 * error)


def test_quantized_gradients_are_refused_where_there_is_no_cuda():
    plan = plan_of("llama", ADAM, {"zero_quantized_gradients": True}, zero=3)
    with pytest.raises(RankFailedError, match="need CUDA kernels, but this host has no CUDA device; remove them"):
        run_ranks(engine_curve, 1, plan)


def norm_of_equal_micro_batches(plan) -> float:
    """Norm of the gradient of a step whose micro-batches are all the same."""
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    batch = micro_batch(0, 0, plan.model.vocab_size)
    return float(build_engine(plan, ranks).train_step(iter([batch] * plan.num_microbatches), 1e-3).grad_norm)


def accumulated_norm(count: int, accumulation: str, precision: str, zero_keys: dict, **layout) -> float:
    """The same from `count` micro-batches; fp16's scale makes up for the division of the loss by their number."""
    deepspeed = {
        "train_batch_size": 2 * count * layout.get("dp", 1),
        "data_types": {"grad_accum_dtype": accumulation},
        "zero_optimization": zero_keys,
    }
    if precision == "fp16":
        deepspeed["fp16"] = {"loss_scale": 256.0 * count}
    plan = tiny_plan("gpt2", precision=precision, deepspeed=deepspeed, **layout)
    assert plan.num_microbatches == count
    norms = run_ranks(norm_of_equal_micro_batches, plan.world_size, plan)
    assert len(set(norms)) == 1
    return norms[0]


@pytest.mark.parametrize(
    ("precision", "zero_keys", "layout"),
    [
        ("bf16", {}, {"tp": 2, "pp": 2}),
        ("bf16", {}, {"dp": 2}),
        ("bf16", {}, {"dp": 2, "zero": 2}),
        ("bf16", {}, {"dp": 2, "zero": 3}),
        ("fp16", {}, {"pp": 2}),
        ("fp16", {}, {"dp": 2, "zero": 3}),
        ("bf16", OPTIMIZER, {"pp": 2}),
        ("bf16", OPTIMIZER, {"dp": 2, "zero": 2}),
        ("bf16", OPTIMIZER, {"dp": 2, "zero": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "none",
)
def test_gradients_are_summed_in_fp32(precision, zero_keys, layout):
    once, often = (accumulated_norm(count, "fp32", precision, zero_keys, **layout) for count in (1, 16))
    # The mean of 16 equal gradients is that gradient. In 16 bits each of the 15 sums would be rounded.
    assert often == pytest.approx(once, rel=2e-6)


def test_gradients_are_summed_in_16_bits_if_asked_for():
    """Or the test above could not tell the types apart."""
    for layout in ({"pp": 2}, {"zero": 2}, {"zero": 3}):
        once, often = (accumulated_norm(count, "bf16", "bf16", {}, **layout) for count in (1, 16))
        assert abs(often / once - 1) > 1e-5, layout
