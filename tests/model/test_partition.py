"""Canonical names, and how full tensors are cut and put together again."""

import pytest
import torch
from ranks import run_ranks
from tiny import MODELS, tiny_plan

from megagpt.model.partition import Partition, canonical_name, partition_of

pytestmark = pytest.mark.usefixtures("libraries")

KINDS = {
    "embedding.word_embeddings.weight": Partition(0, vocabulary=True),
    "embedding.position_embeddings.weight": Partition(None),
    "layers.0.input_layernorm.weight": Partition(None),
    "layers.11.self_attention.linear_qkv.weight": Partition(0),
    "layers.11.self_attention.linear_qkv.bias": Partition(0),
    "layers.0.self_attention.linear_proj.weight": Partition(1),
    "layers.0.self_attention.linear_proj.bias": Partition(None),
    "layers.0.self_attention.q_layernorm.weight": Partition(None),
    "layers.0.pre_mlp_layernorm.bias": Partition(None),
    "layers.0.mlp.linear_fc1.weight": Partition(0, gated=True),
    "layers.0.mlp.linear_fc1.bias": Partition(0, gated=True),
    "layers.0.mlp.linear_fc2.weight": Partition(1),
    "layers.0.mlp.router.weight": Partition(None),
    "layers.0.mlp.experts.12.linear_fc1.weight": Partition(0, gated=True),
    "layers.0.mlp.experts.12.linear_fc2.weight": Partition(1),
    "layers.0.mlp.shared_experts.linear_fc1.weight": Partition(0, gated=True),
    "layers.0.mlp.shared_experts.gate_weight": Partition(None),
    "layers.0.mlp.linear_fc2.bias": Partition(None),
    "final_norm.weight": Partition(None),
    "head.weight": Partition(0, vocabulary=True),
}


@pytest.mark.parametrize(("name", "expected"), KINDS.items())
def test_each_name_has_its_partition(name, expected):
    assert partition_of(name, gated_mlp=True) == expected
    plain = Partition(expected.dim, False, expected.vocabulary)
    assert partition_of(name, gated_mlp=False) == plain


@pytest.mark.parametrize(
    "name",
    ["layers.0.mlp.router.bias", "head.bias", "layers.0.mlp.linear_fc3.weight", "my_head.weight", "embedding.weight"],
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(AssertionError, match=f"no partition rule for parameter '{name}'"):
        partition_of(name, gated_mlp=True)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", KINDS)
def test_shards_join_to_the_whole(name, gated, size):
    partition = partition_of(name, gated)
    rows, padded = (13, 16) if partition.vocabulary else (16, None)
    whole = torch.arange(rows * (8 if name.endswith("weight") else 1)).reshape(rows, -1).float() + 1
    shards = [partition.shard(whole, rank, size, padded) for rank in range(size)]
    assert torch.equal(partition.join(shards, rows), whole)
    if partition.dim is not None:
        copy = torch.zeros_like(whole)
        for rank, shard in enumerate(shards):
            views = partition.views(copy, rank, size, padded or rows)
            begin = 0
            for view in views:
                view.copy_(shard.narrow(partition.dim, begin, view.shape[partition.dim]))
                begin += view.shape[partition.dim]
        assert torch.equal(copy, whole)
    assert len({shard.shape for shard in shards}) == 1
    elements = sum(shard.numel() for shard in shards)
    if partition.dim is None:
        assert all(torch.equal(shard, whole) for shard in shards)
    else:
        assert elements == whole.numel() * (padded or rows) // rows, "nothing is held twice"
    if padded and size == 4:
        assert torch.equal(shards[3][1:], torch.zeros(3, 8)), "12 of 13 rows are in the other shards"


def test_a_ranks_gate_meets_its_own_up_branch():
    gate, up = torch.arange(8.0)[:, None], 100 + torch.arange(8.0)[:, None]
    shard = Partition(0, gated=True).shard(torch.cat([gate, up]), 1, 4)
    assert shard.flatten().tolist() == [2, 3, 102, 103]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("tied_modules.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("1.block.mlp.linear_fc1.weight", "layers.0.mlp.linear_fc1.weight"),
        ("module.4.block.mlp.linear_fc1.weight", "layers.3.mlp.linear_fc1.weight"),
        ("5.weight", "final_norm.weight"),
        ("6.weight", "head.weight"),
        ("layers.3.block.mlp.linear_fc1.weight", "layers.3.mlp.linear_fc1.weight"),
        ("head.weight", "head.weight"),
    ],
)
def test_names_become_canonical(name, expected):
    assert canonical_name(name, num_layers=4) == expected


def test_experts_are_numbered_over_all_ranks():
    name = "module.2.block.mlp.experts.local_experts.1.linear_fc2.weight"
    assert canonical_name(name, num_layers=4, first_expert=6) == "layers.1.mlp.experts.7.linear_fc2.weight"


def stage_names(plan) -> tuple[int, set[str], dict[str, tuple[int, ...]]]:
    """This rank's stage, its canonical names, and the shapes of the full tensors."""
    from megagpt.engine import build_engine
    from megagpt.model.initialize import full_shape
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    shapes = {
        name: full_shape(torch.empty(engine.shard_shape(name)), partition_of(name, plan.model.is_gated), plan)
        for name in engine.parameters
    }
    return ranks.pipeline_rank, set(engine.parameters), shapes


@pytest.mark.parametrize("model", MODELS)
def test_stages_have_the_names_and_shapes_that_conversion_knows(model):
    from megagpt.convert.canonical import canonical_shapes

    plan = tiny_plan(model, tp=2, pp=2, sp="num_experts" in MODELS[model])
    expected = canonical_shapes(plan.model)
    results = run_ranks(stage_names, 4, plan)
    assert {name: shape for *_, shapes in results for name, shape in shapes.items()} == expected
    first, last = (set().union(*(names for stage, names, _ in results if stage == s)) for s in (0, 1))
    shared = set() if plan.model.untie_embeddings_and_output_weights else {"embedding.word_embeddings.weight"}
    assert first & last == shared, "stages share tied weights and nothing else"
    ((_, single, shapes),) = run_ranks(stage_names, 1, tiny_plan(model))
    assert single == set(expected)
    assert shapes == expected
