"""Every collective is counted once, and a step moves what the papers and `traffic_per_step` say."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import SGD, rank_batches, tiny_plan

from megagpt.plan import deepspeed_config_from_dict, make_plan, traffic_per_step

pytestmark = pytest.mark.usefixtures("libraries")

WHOLE_LAYERS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}
"""Thresholds of ZeRO 3 at which it treats a tiny model as it does a large one by default."""


def plan_of(layout: dict):
    """A tiny plan; `zero_keys` go into the DeepSpeed config's zero_optimization."""
    layout = dict(layout)
    zero_keys = layout.pop("zero_keys", {})
    plan = tiny_plan(layout.pop("model", "llama"), SGD, **layout)
    raw = {**plan.deepspeed.raw, "zero_optimization": {**plan.deepspeed.raw["zero_optimization"], **zero_keys}}
    return make_plan(plan.run, deepspeed_config_from_dict(raw), plan.world_size)


def traffic_of_steps(plan) -> list:
    """Traffic of the first and the third step, on this rank.

    By then ZeRO 3 has compared the order of its layers among the ranks, which it does in its second forward pass.
    """
    from megagpt.engine import build_engine
    from megagpt.parallel.accounting import count_traffic
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    steps = []
    for step in range(3):
        with count_traffic(ranks) as traffic:
            engine.train_step(rank_batches(plan, ranks.data_rank, step), 0.1)
        steps.append(traffic)
    return [steps[0], steps[-1]]


@pytest.fixture(scope="module")
def measured(libraries):
    """Traffic of those two steps on every rank of a layout; each layout runs once."""
    cache: dict[str, list] = {}

    def get(**layout):
        if repr(layout) not in cache:
            plan = plan_of(layout)
            cache[repr(layout)] = run_ranks(traffic_of_steps, plan.world_size, plan)
        return cache[repr(layout)]

    return get


def talk(plan) -> tuple:
    """One of each collective on groups of a TP 2 x PP 2 job, 10 fp32 numbers a rank."""
    from megagpt.parallel.accounting import count_traffic
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    method = vars(dist.ProcessGroup)["allreduce"]
    part, pair = torch.ones(10), torch.empty(20)
    group = ranks.tensor_group
    with count_traffic(ranks) as outer:
        dist.all_reduce(part)
        with count_traffic(ranks) as inner:
            dist.all_reduce(part, group=ranks.pipeline_group)
            dist.all_gather([torch.empty(10), torch.empty(10)], part, group=group)
            dist.all_gather_into_tensor(pair, part, group=group)
            dist.reduce_scatter_tensor(part, pair, group=group)
            dist.broadcast(part, src=dist.get_global_rank(group, 0), group=group)
            dist.all_to_all_single(torch.empty(10), part, group=group)
            dist.reduce(part, dst=dist.get_global_rank(group, 0), group=group)
            dist.barrier(group)
            other = (ranks.rank + 2) % 4
            works = dist.batch_isend_irecv([dist.P2POp(dist.isend, part, other), dist.P2POp(dist.irecv, pair, other)])
            [work.wait() for work in works]
            import deepspeed.comm

            deepspeed.comm.all_reduce(part, group=ranks.data_group)
        x = torch.ones(3, requires_grad=True)
        x.register_hook(lambda gradient: dist.all_reduce(gradient, group=group))
        (2 * x).sum().backward()
    dist.all_reduce(part)
    return inner.calls, outer.calls, vars(dist.ProcessGroup)["allreduce"] is method


def test_every_collective_is_counted_once_however_it_is_called(libraries):
    for inner, outer, restored in run_ranks(talk, 4, tiny_plan("llama", tp=2, pp=2)):
        assert [(call.group, call.collective, call.payload) for call in inner] == [
            ("pipeline", "all_reduce", 40),
            ("tensor", "all_gather", 80),
            ("tensor", "all_gather", 80),
            ("tensor", "reduce_scatter", 80),
            ("tensor", "broadcast", 40),
            ("tensor", "all_to_all", 40),
            ("tensor", "reduce", 40),
            ("tensor", "barrier", 0),
            ("pipeline", "send", 40),
            ("pipeline", "recv", 80),
            ("self", "all_reduce", 40),
        ]
        assert [call.ring_bytes for call in inner] == [40, 40, 40, 40, 20, 20, 20, 0, 40, 0, 0]
        first, *middle, last = outer
        assert (first.group, first.size, first.ring_bytes) == ("model", 4, 2 * 3 / 4 * 40)
        assert middle == inner, "an outer count sees what an inner one sees"
        assert (last.group, last.payload, last.in_backward, first.in_backward) == ("tensor", 12, True, False)
        assert restored


S, B, H, LAYERS, MICROBATCHES = 32, 2, 64, 4, 4
SBH = 4 * S * B * H


def test_tensor_parallelism_all_reduces_twice_a_layer_and_direction(measured):
    for _, step in measured(tp=2):
        tensor = step.without_scalars().select(group="tensor")
        assert Counter((call.collective, call.payload, call.in_backward) for call in tensor.calls) == {
            ("all_reduce", SBH, False): MICROBATCHES * (2 * LAYERS + 1),  # 1: the embedding
            ("all_reduce", SBH, True): MICROBATCHES * (2 * LAYERS + 1),  # 1: the head
            ("all_reduce", 4 * S * B, False): MICROBATCHES,  # the loss: largest logits
            ("all_reduce", 2 * 4 * S * B, False): MICROBATCHES,  # the loss: sums of exponentials, logits of the labels
        }


def test_sequence_parallelism_moves_the_bytes_of_tensor_parallelism(measured):
    """arXiv 2205.05198, section 4.2.2; on top Megatron-Core gathers each layer's input again in the backward pass."""
    whole, parted = (measured(tp=2, **more)[0][1].select(group="tensor", payload=SBH) for more in ({}, {"sp": True}))
    assert whole.select(collective="all_reduce").calls == whole.calls
    assert parted.select(collective="all_reduce").calls == []
    forward, backward = (parted.select(in_backward=in_backward) for in_backward in (False, True))
    assert forward.ring_bytes == whole.select(in_backward=False).ring_bytes
    again = MICROBATCHES * 2 * LAYERS * SBH / 2
    assert backward.ring_bytes - again == whole.select(in_backward=True).ring_bytes


def test_a_pipeline_sends_one_activation_and_one_gradient_per_boundary_and_micro_batch(measured):
    first, middle, last = (ranks[1].select(group="pipeline", collective="send") for ranks in measured(pp=3))
    assert [call.payload for call in first.calls + last.calls] == [SBH] * 2 * MICROBATCHES
    assert [call.payload for call in middle.calls] == [SBH] * 2 * MICROBATCHES
    announced, *sent = measured(pp=3)[0][0].select(collective="send").calls
    assert announced.payload == 1024, "DeepSpeed sends the shape first, once for all steps"
    assert [call.payload for call in sent] == [SBH] * MICROBATCHES


@pytest.mark.parametrize(("stage", "keys", "share", "collective"), [
    (1, {}, 2, "all_reduce"),
    (1, {"use_multi_rank_bucket_allreduce": False}, 1, "reduce"),
    (2, {}, 2, "all_reduce"),
    (2, {"use_multi_rank_bucket_allreduce": False}, 1, "reduce"),
    (3, WHOLE_LAYERS, 1, "reduce_scatter"),
])  # fmt: skip
def test_zero_moves_its_multiple_of_the_parameters(measured, stage, keys, share, collective):
    """ZeRO (arXiv 1910.02054, section 7): 2 P in stages 1 and 2 and 3 P in stage 3, as ring bytes times n / (n - 1).

    DeepSpeed's default all-reduces the gradients of stages 1 and 2: 3 P; `use_multi_rank_bucket_allreduce: false` gives
    the 2 P. Stages 2 and 3 reduce each of the two micro-batches, and stage 3 gathers the weights for each as well.
    """
    plan = plan_of({"dp": 2, "zero": stage, "zero_keys": keys})
    weights = 4 * plan.num_parameters + 4 * H * (plan.padded_vocab_size - 250) * 2
    for _, step in measured(dp=2, zero=stage, zero_keys=keys):
        traffic = step.without_scalars().select(group="data")
        gradients, gathered = traffic.select(collective=collective), traffic.select(collective="all_gather")
        assert len(gradients.calls) + len(gathered.calls) == len(traffic.calls)
        passes = 2
        assert gradients.ring_bytes * 2 == pytest.approx(share * weights * (passes if stage > 1 else 1), rel=0.01)
        assert gathered.ring_bytes * 2 == pytest.approx(weights * (2 * passes if stage == 3 else 1), rel=0.01)


FULL = {"recompute_granularity": "full"}
HPZ = {"zero_hpz_partition_size": 2}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
TIED = {"model": {"untie_embeddings_and_output_weights": False}}
ALLGATHER = {"parallel": {"moe_token_dispatcher_type": "allgather"}}
LAYOUTS = [
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"pp": 3},
    {"tp": 2, "pp": 2, "recompute": FULL},
    {"tp": 2, "recompute": {**FULL, "recompute_num_layers": 3, "distribute_saved_activations": True}},
    {"tp": 2, "sp": True, "recompute": {**FULL, "recompute_method": "block"}},
    {"pp": 2, "dp": 2, "precision": "bf16"},
    {"model": "gpt2", "tp": 2, "pp": 2, "precision": "bf16"},
    {"model": "gpt2", "tp": 2, "pp": 2, "sp": True},
    {"model": "gpt2", "tp": 2, "dp": 2, "zero": 2, "sp": True},
    {"model": "neox", "tp": 2, "sp": True},
    {"model": "qwen3", "tp": 2, "sp": True},
    {"tp": 2, "sp": True, "recompute": FULL, "sections": {"model": {"num_query_groups": 1}}},
    {"cp": 2, "dp": 2, "precision": "bf16"},
    {"tp": 2, "cp": 2, "sp": True, "recompute": FULL},
    {"cp": 2, "pp": 2},
    {"dp": 2, "zero": 1, "zero_keys": {}},
    {"dp": 2, "zero": 1, "zero_keys": {"use_multi_rank_bucket_allreduce": False}},
    {"dp": 2, "zero": 1, "precision": "bf16", "zero_keys": {"use_multi_rank_bucket_allreduce": False}},
    {"dp": 2, "zero": 2, "precision": "bf16", "zero_keys": {"use_multi_rank_bucket_allreduce": False}},
    {"dp": 2, "zero": 1, "precision": "bf16", "zero_keys": {**OFFLOAD, "use_multi_rank_bucket_allreduce": False}},
    {"dp": 2, "zero": 2, "zero_keys": {}},
    {"dp": 2, "zero": 3, "zero_keys": WHOLE_LAYERS},
    {"tp": 2, "dp": 2, "zero": 3, "precision": "bf16", "zero_keys": WHOLE_LAYERS},
    {"dp": 2, "zero": 3, "zero_keys": WHOLE_LAYERS, "sections": TIED},
    {"dp": 2, "zero": 3, "zero_keys": WHOLE_LAYERS, "recompute": FULL},
    {"dp": 4, "zero": 3, "zero_keys": {**WHOLE_LAYERS, **HPZ}, "sections": TIED},
    {"dp": 4, "zero": 3, "precision": "bf16", "zero_keys": {**WHOLE_LAYERS, **HPZ}},
    {"cp": 2, "dp": 2, "zero": 3, "zero_keys": {**WHOLE_LAYERS, **HPZ}, "recompute": FULL},
]


EXPERT_LAYOUTS = [
    {"model": "mixtral", "tp": 2, "sp": True},
    {"model": "mixtral", "dp": 2, "ep": 2, "zero": 2, "precision": "bf16"},
    {"model": "mixtral", "tp": 2, "dp": 2, "ep": 2, "sp": True, "recompute": FULL},
    {"model": "shared_expert", "pp": 2, "dp": 2, "ep": 2, "precision": "bf16"},
    {"model": "mixtral", "dp": 4, "ep": 2},
    {"model": "mixtral", "cp": 2, "dp": 2, "ep": 4},
    {"model": "mixtral", "cp": 2, "tp": 2, "sp": True, "ep": 2},
    {"model": "shared_expert", "tp": 2, "dp": 2, "ep": 2, "sp": True, "sections": ALLGATHER, "precision": "bf16"},
    {"model": "mixtral", "tp": 2, "dp": 2, "ep": 2, "sp": True, "precision": "bf16"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items())[:60])
def test_the_plan_foretells_the_traffic_of_every_rank(measured, layout):
    plan = plan_of(layout)
    for rank, (_, step) in enumerate(measured(**layout)):
        stage = rank // (plan.world_size // plan.pipeline_parallel_size)
        foretold: Counter = Counter()
        for transfer in traffic_per_step(plan, stage):
            foretold[transfer.group, transfer.collective] += transfer.ring_bytes
        counted = {key: sent for key, (_, sent) in step.without_scalars().totals().items() if sent > 0}
        # ZeRO pads what it cuts
        assert counted == pytest.approx(foretold, rel=0.005)


@pytest.mark.parametrize(
    "layout", EXPERT_LAYOUTS, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items())[:60]
)
def test_the_plan_foretells_the_traffic_of_experts(measured, layout):
    """On average over the ranks of a stage: which of them gets how many tokens is up to the routers."""
    plan = plan_of(layout)
    ranks = [step.without_scalars().totals() for _, step in measured(**layout)]
    size = plan.world_size // plan.pipeline_parallel_size
    for stage in range(plan.pipeline_parallel_size):
        members = ranks[stage * size : (stage + 1) * size]
        counted = {
            key: sum(totals.get(key, (0, 0.0))[1] for totals in members) / size for totals in members for key in totals
        }
        foretold: Counter = Counter()
        for transfer in traffic_per_step(plan, stage):
            transfer = transfer.without_cuda()
            foretold[transfer.group, transfer.collective] += transfer.ring_bytes
        assert {key: sent for key, sent in counted.items() if sent > 0} == pytest.approx(foretold, rel=0.005)


def test_parts_of_different_sizes_cost_less_where_there_is_cuda():
    plan = plan_of(EXPERT_LAYOUTS[0])
    uneven = [transfer for transfer in traffic_per_step(plan, 0) if transfer.is_uneven]
    assert {transfer.collective for transfer in uneven} == {"all_gather", "reduce_scatter"}
    assert all(transfer.without_cuda().ring_bytes == 2 * transfer.ring_bytes for transfer in uneven)
