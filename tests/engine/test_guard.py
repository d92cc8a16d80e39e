"""A step with a gradient that is no number on one rank changes nothing on any rank, whatever engine and stage."""

import math
import os

import pytest
from ranks import run_ranks
from tiny import SGD, rank_batches, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
LAYOUTS = {
    "pipeline bf16": dict(tp=2, pp=2, precision="bf16"),
    "pipeline fp32 over replicas": dict(pp=2, dp=2),
    "ZeRO 1 bf16": dict(dp=2, precision="bf16"),
    "ZeRO 2": dict(dp=2, zero=2),
    "ZeRO 2 offload bf16": dict(tp=2, dp=2, zero=2, precision="bf16", deepspeed=OFFLOAD),
    "ZeRO 3": dict(dp=2, zero=3),
    "ZeRO 3 offload": dict(dp=2, zero=3, deepspeed=OFFLOAD),
    "one rank": dict(),
}


def losses_with_bad_steps(plan, bad: dict[int, str], left_out: tuple[int, ...] = ()) -> list:
    """(loss, problem) of each step but those left out; rank 1, or the only one, spoils its numbers in bad steps."""
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    def judge(loss: float, norm: float) -> str | None:
        return None if math.isfinite(loss) and math.isfinite(norm) and loss < 100 else "bad"

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks, judge=judge)
    spoils = int(os.environ["RANK"]) == min(1, ranks.world_size - 1)
    now = {"kind": ""}
    parameter = next(iter(engine.parameters.values()))
    if spoils:
        parameter.register_hook(lambda grad: grad * float("nan") if now["kind"] == "gradient" else grad)
    curve = []
    for step in range(plan.run.training.steps):
        if step in left_out:
            continue
        now["kind"] = bad.get(step, "")
        rehearsal = now["kind"] == "rehearsal"
        result = engine.train_step(rank_batches(plan, ranks.data_rank, step), 0.1, rehearsal=rehearsal)
        assert result.skipped == (result.problem is not None)
        curve.append((float(result.loss), result.problem))
    return curve


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_is_as_if_it_had_never_been(layout: str) -> None:
    plan = tiny_plan("llama", SGD, steps=5, **LAYOUTS[layout])
    world = plan.world_size
    curves = run_ranks(losses_with_bad_steps, world, plan, {1: "gradient", 3: "rehearsal"})
    assert all(curve == curves[0] for curve in curves), "all ranks agree"
    assert [problem for _, problem in curves[0]] == [None, "bad", None, None, None]
    without = run_ranks(losses_with_bad_steps, world, plan, {}, left_out=(1, 3))
    assert [curves[0][step][0] for step in (0, 2, 4)] == [loss for loss, _ in without[0]]
    assert len({loss for loss, _ in without[0]}) == 3, "the weights do change in good steps"
