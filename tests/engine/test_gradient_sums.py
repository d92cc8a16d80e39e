"""Gradients in bf16 are added to their fp32 sums as DeepSpeed does it, but in one pass."""

import pytest
from curves import train_under_deepspeed
from ranks import run_ranks
from tiny import ADAM, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

METHOD = "accumulate_hp_grads_and_remove_lp"


def curves(plan) -> list[list[tuple[float, float]]]:
    """With DeepSpeed's own way and with ours."""
    from megagpt.engine import engine

    own, found = engine.add_gradients_in_one_pass, []
    for way in (lambda optimizer: None, own):
        engine.add_gradients_in_one_pass = way
        curve, trained = train_under_deepspeed(plan)
        found.append(curve)
        assert (METHOD in vars(trained._wrapped.optimizer)) == (way is own)
    return found


@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}], ids=str)
def test_sums_are_deepspeeds(layout):
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    assert hasattr(BF16_Optimizer, METHOD), "DeepSpeed calls it otherwise now"
    plan = tiny_plan("llama-tied", ADAM, precision="bf16", **layout)
    for theirs, ours in run_ranks(curves, plan.world_size, plan):
        assert theirs == ours
