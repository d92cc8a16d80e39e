"""Activation checkpointing changes nothing: bit for bit the losses and norms of the same layout without it."""

import pytest
import torch
from ranks import in_own_process, run_ranks
from test_layouts import engine_curve
from tiny import SGD, micro_batch, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

FULL = {"recompute_granularity": "full"}
PAIRS = {**FULL, "recompute_num_layers": 2}
FIRST = {**FULL, "recompute_method": "block", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
DISTRIBUTED = {**PAIRS, "distribute_saved_activations": True}
OFFLOADED = {**FULL, "offload_saved_activations": True}
BOTH = {**FULL, "distribute_saved_activations": True, "offload_saved_activations": True}

LAYOUTS = {
    "tp2-pp2": dict(tp=2, pp=2),
    "tp2-pp2-sp": dict(tp=2, pp=2, sp=True),
    "tp2-sp": dict(tp=2, sp=True),
    "tp2-zero3": dict(tp=2, zero=3),
    "tp2-cp2-sp": dict(tp=2, cp=2, sp=True),
    "cp2-pp2": dict(cp=2, pp=2),
}
CASES = [
    ("tp2-pp2", FULL),
    ("tp2-pp2", FIRST),
    ("tp2-pp2", SELECTIVE),
    ("tp2-pp2", DISTRIBUTED),
    ("tp2-pp2", BOTH),
    ("tp2-pp2-sp", PAIRS),
    ("tp2-pp2-sp", OFFLOADED),
    ("tp2-sp", PAIRS),
    ("tp2-sp", SELECTIVE),
    ("tp2-zero3", PAIRS),
    ("tp2-zero3", BOTH),
    ("tp2-zero3", SELECTIVE),
    ("tp2-cp2-sp", PAIRS),
    ("tp2-cp2-sp", SELECTIVE),
    ("cp2-pp2", OFFLOADED),
]


def dropout_plan(layout, recompute=None):
    return tiny_plan("gpt2", SGD, steps=3, dropout=0.2, recompute=recompute, **LAYOUTS[layout])


@pytest.fixture(scope="module")
def kept(libraries):
    """Curves of all ranks without recomputation, by layout."""
    curves = {}

    def get(layout):
        if layout not in curves:
            plan = dropout_plan(layout)
            curves[layout] = run_ranks(engine_curve, plan.world_size, plan)
        return curves[layout]

    return get


@pytest.mark.parametrize(("layout", "recompute"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_recomputation_replays_dropout(kept, layout, recompute):
    plan = dropout_plan(layout, recompute)
    assert run_ranks(engine_curve, plan.world_size, plan) == kept(layout)


def saved_bytes(plan) -> int:
    """Bytes on the device that one forward pass of the layers keeps for the backward pass, weights not counted."""
    from megagpt.model import GPT
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    model = GPT(plan)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden_SBH = model.embedding(micro_batch(0, 0, plan.model.vocab_size)[0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for run in model._runs:
            hidden_SBH = run(hidden_SBH)
    assert hidden_SBH.requires_grad
    return sum(kept.values())


@in_own_process
def test_what_is_kept_is_what_the_plan_says():
    plain = tiny_plan("llama")
    model = plain.model
    layer_input = 4 * plain.microbatch_size * plain.seq_length * model.hidden_size
    everything = saved_bytes(plain)
    assert saved_bytes(tiny_plan("llama", recompute=FULL)) == model.num_layers * layer_input
    assert saved_bytes(tiny_plan("llama", recompute=PAIRS)) == model.num_layers // 2 * layer_input
    first = saved_bytes(tiny_plan("llama", recompute=FIRST))
    assert first == pytest.approx(layer_input + everything * 3 / 4, rel=0.05)
    assert saved_bytes(tiny_plan("llama", recompute=SELECTIVE)) < everything


def kept_parts(plan) -> list[tuple[int, bool]]:
    """Elements of each kept input on this rank, and whether it comes back as it was."""
    from megagpt.model import GPT
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    start_ranks(plan, detect_launch())
    model = GPT(plan)
    parts = []
    for run in model._runs:
        hidden_SBH = torch.randn(5, 2, plan.model.hidden_size, generator=torch.Generator().manual_seed(0))
        packed = run._pack(hidden_SBH)
        parts.append((packed[0].numel(), torch.equal(run._unpack(packed), hidden_SBH)))
    return parts


def test_each_tensor_parallel_rank_keeps_its_part(libraries):
    for parts in run_ranks(kept_parts, 2, tiny_plan("gpt2", tp=2, recompute=DISTRIBUTED)):
        assert parts == [(5 * 2 * 48 // 2, True)] * 2
