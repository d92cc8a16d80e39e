"""ZeRO 3 cuts each layer before the next one is built: no rank ever holds more than one layer whole."""

from unittest import mock

import pytest
from ranks import run_ranks
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")


def sizes_while_building(plan) -> tuple[list[int], int]:
    """Elements of whole parameters whenever a layer is built, and of all parameters together."""
    from megagpt.engine import build_engine, engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    original, built, whole = engine.finish_cut, [], []

    def finish(prefix, layer, *args):
        built.append(layer)
        whole.append(sum(parameter.numel() for one in built for parameter in one.parameters()))
        original(prefix, layer, *args)

    with mock.patch.object(engine, "finish_cut", finish):
        made = build_engine(plan, start_ranks(plan, detect_launch()))
    return whole, sum(parameter.ds_numel for parameter in made.parameters.values())


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_one_layer_at_a_time_is_whole(libraries, model):
    plan = tiny_plan(model, tp=2, dp=2, zero=3, precision="bf16")
    for whole, total in run_ranks(sizes_while_building, 4, plan):
        assert len(whole) == plan.model.num_layers + 3
        assert sum(whole) == total, "what was built before is cut"
        assert max(whole) < total / 2


def test_a_model_that_zero_plus_plus_cuts_twice_is_built_whole():
    for size in (1, 2):
        keys = {"zero_optimization": {"zero_hpz_partition_size": size}}
        plan = tiny_plan("llama", dp=4, zero=3, deepspeed=keys)
        assert plan.is_cut_while_built == (size == 1)
        assert any("first builds its whole" in note for note in plan.notes) == (size == 2)
