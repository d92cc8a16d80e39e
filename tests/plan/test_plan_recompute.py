"""Which layers of a stage are recomputed together."""

import pytest

from megagpt.plan.config import TrainingConfig
from megagpt.plan.recompute import layer_runs, recomputed_layers


def runs(num_stage_layers, granularity="full", **keys):
    training = TrainingConfig(steps=1, seq_length=8, recompute_granularity=granularity, **keys)
    return [(run.num_layers, run.is_recomputed) for run in layer_runs(training, num_stage_layers)]


@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_whole_layers_are_recomputed_by_full_only(granularity):
    assert runs(5, granularity) == [(5, False)]


def test_uniform_makes_segments_and_leaves_no_layer_out():
    assert runs(5) == [(1, True)] * 5
    assert runs(5, recompute_num_layers=2) == [(2, True), (2, True), (1, True)]
    assert runs(5, recompute_num_layers=9) == [(5, True)]
    assert runs(0, recompute_num_layers=2) == []


def test_block_recomputes_the_first_layers_one_by_one():
    block = {"recompute_method": "block"}
    assert runs(5, recompute_num_layers=2, **block) == [(1, True), (1, True), (3, False)]
    assert runs(2, recompute_num_layers=2, **block) == [(1, True), (1, True)]
    assert runs(0, **block) == []


def test_recomputed_layers_are_counted_stage_by_stage():
    block = TrainingConfig(
        steps=1, seq_length=8, recompute_granularity="full", recompute_method="block", recompute_num_layers=3
    )
    assert recomputed_layers(block, [4, 2, 4]) == 3 + 2 + 3
