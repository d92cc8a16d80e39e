"""What ranks really hold: model states are those of the ZeRO formulas, activations those of the published ones."""

import gc

import pytest
import torch
import torch.nn.functional as F
from ranks import in_own_process, run_ranks
from tiny import ADAM, rank_batches, tiny_plan

from megagpt.plan import deepspeed_config_from_dict, make_plan
from megagpt.plan.estimates import layer_activation_bytes

pytestmark = pytest.mark.usefixtures("libraries")


def live_storages() -> dict[int, int]:
    """Address and bytes of every tensor's memory, each once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def peak_state_bytes(plan) -> int:
    """Largest memory of tensors made since before the engine, at the ends of micro-batches and at the update."""
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    before = live_storages()
    engine = build_engine(plan, ranks)
    engine.train_step(rank_batches(plan, ranks.data_rank, 0), 1e-3)
    samples = []

    def sample(*_) -> None:
        samples.append(sum(size for address, size in live_storages().items() if address not in before))

    if plan.pipeline_parallel_size > 1:
        engine._optimizer.register_step_pre_hook(sample)
    else:  # the backward pass of a micro-batch is over, its activations are free
        step = engine._wrapped.step
        engine._wrapped.step = lambda: (sample(), step())
    engine.train_step(rank_batches(plan, ranks.data_rank, 1), 1e-3)
    return max(samples)


STATES = [
    {"dp": 2, "zero": 1, "precision": "bf16"},
    {"dp": 2, "zero": 1},
    {"dp": 2, "zero": 3},
    {"dp": 2, "zero": 2, "precision": "bf16"},
    {"dp": 2, "zero": 3, "precision": "bf16"},
    {"pp": 2, "dp": 2, "precision": "bf16"},
    {"dp": 4, "zero": 3, "precision": "bf16", "zero_keys": {"zero_hpz_partition_size": 2}},
]


@pytest.mark.parametrize("layout", STATES, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items()))
def test_model_states_take_what_zero_says(layout):
    # wide enough for the other tensors (positions, buffers of pipeline stages) to be small
    layout = dict(layout)
    keys = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0, **layout.pop("zero_keys", {})}  # fmt: skip
    plan = tiny_plan("llama", ADAM, **layout, sections={"model": {"hidden_size": 128, "ffn_hidden_size": 320}})
    raw = {**plan.deepspeed.raw, "zero_optimization": {**plan.deepspeed.raw["zero_optimization"], **keys}}
    plan = make_plan(plan.run, deepspeed_config_from_dict(raw), plan.world_size)
    for rank, peak in enumerate(run_ranks(peak_state_bytes, plan.world_size, plan)):
        memory = plan.memory_per_stage[rank // (plan.world_size // plan.pipeline_parallel_size)]
        assert peak == pytest.approx(memory.total - memory.activations, rel=0.05)


def saved_bytes(compute, exclude: set[int] = frozenset()) -> int:
    """Memory that autograd keeps for the backward pass of `compute`, each storage once.

    Args:
        exclude: addresses that do not count (parameters).
    """
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in exclude)


def layer_bytes(plan) -> float:
    """Memory that the second layer keeps, on this rank, as it is where dropout is a fused kernel.

    The CPU's dropout keeps a mask of the input's type instead of bool.
    """
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    layer = build_engine(plan, start_ranks(plan, detect_launch()))._module.layers[1]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sequence = plan.seq_length // (plan.tensor_parallel_size if plan.run.parallel.sequence_parallel else 1)
    hidden = torch.randn(sequence, plan.microbatch_size, plan.model.hidden_size, dtype=torch.bfloat16)
    hidden.requires_grad_()
    total = saved_bytes(lambda: layer(hidden), parameters)
    if plan.model.hidden_dropout > 0:
        total -= 2 * (saved_bytes(lambda: F.dropout(hidden, plan.model.hidden_dropout)) - hidden.numel())
    return total


WIDE = {"hidden_size": 256, "num_attention_heads": 16, "ffn_hidden_size": 1024}


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("model", ["llama", "gpt2", "neox"])
def test_a_layer_keeps_what_the_papers_say(model, tp, sp):
    """arXiv 2205.05198, table 2, selective: `s b h (10 + 24/t)`, with sequence parallelism `34 s b h / t`."""
    groups = {"num_query_groups": 4} if model == "llama" else {"hidden_dropout": 0.1}
    plan = tiny_plan(model, ADAM, tp=tp, sp=sp, precision="bf16", sections={"model": {**WIDE, **groups}})
    (measured, *_) = run_ranks(layer_bytes, tp, plan)
    estimate = layer_activation_bytes(plan.model, plan.seq_length, plan.microbatch_size, tp, sp, "bf16")
    assert measured == pytest.approx(estimate, rel=0.03)
    if model == "gpt2":
        sbh = plan.seq_length * plan.microbatch_size * plan.model.hidden_size
        assert measured == pytest.approx(sbh * (34 / tp if sp else 10 + 24 / tp), rel=0.02)


ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("name", ACTIVATIONS)
@in_own_process
def test_gated_activation_is_the_plain_one(name):
    from megagpt.model.activation import GatedActivation

    torch.manual_seed(0)
    projected = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    gated, activation = GatedActivation(name), ACTIVATIONS[name]
    gate, up = projected.chunk(2, -1)
    assert torch.equal(gated(projected), activation(gate) * up)
    assert torch.autograd.gradcheck(gated, projected)
    assert saved_bytes(lambda: gated(projected)) == projected.nbytes
