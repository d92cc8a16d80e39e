"""Groups, agreement and random states of real ranks."""

import os

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_plan

from megagpt.errors import LaunchError

pytestmark = pytest.mark.usefixtures("libraries")


def joined(plan) -> dict:
    """This rank's place, what its groups add up to, and what it draws."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    groups = {}
    for name in ("tensor", "context", "data", "gradient", "pipeline"):
        mask = torch.tensor(1 << ranks.rank)
        dist.all_reduce(mask, group=getattr(ranks, f"{name}_group"))
        groups[name] = [rank for rank in range(ranks.world_size) if int(mask) >> rank & 1]
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(1).item()
    return {
        "place": (ranks.tensor_rank, ranks.data_rank, ranks.pipeline_rank),
        "context": (ranks.context_rank, ranks.gradient_rank),
        "ends": (ranks.is_first_stage, ranks.is_last_stage),
        "members": groups,
        "outside": torch.rand(1).item(),
        "inside": inside,
        "any": (ranks.any(ranks.rank == 2), ranks.any(False)),
        "broadcast": ranks.broadcast_object({"from": ranks.rank}),
        "gathered": ranks.gather_objects(f"rank {ranks.rank}"),
        "mpu": (ranks.mpu.get_model_parallel_rank(), ranks.mpu.get_data_parallel_world_size()),
    }


@pytest.fixture(scope="module")
def four(libraries) -> dict[str, list[dict]]:
    layouts = {"tp2pp2": dict(tp=2, pp=2), "tp2dp2": dict(tp=2, dp=2), "tp2cp2": dict(tp=2, cp=2)}
    return {name: run_ranks(joined, 4, tiny_plan(**layout)) for name, layout in layouts.items()}


def test_tensor_ranks_are_neighbours_and_stages_lie_farthest_apart(four):
    assert [rank["place"] for rank in four["tp2pp2"]] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [rank["place"] for rank in four["tp2dp2"]] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert members(four["tp2pp2"][1]) == {"tensor": [0, 1], "pipeline": [1, 3]}
    assert members(four["tp2dp2"][1]) == {"tensor": [0, 1], "data": [1, 3], "gradient": [1, 3]}
    assert [rank["ends"] for rank in four["tp2pp2"]] == [(True, False)] * 2 + [(False, True)] * 2
    assert [rank["mpu"] for rank in four["tp2dp2"]] == [(0, 2), (1, 2)] * 2


def members(rank: dict) -> dict[str, list[int]]:
    """Groups with more than one member."""
    return {name: group for name, group in rank["members"].items() if len(group) > 1}


def test_context_parallel_ranks_see_the_same_samples_and_average_gradients(four):
    assert [rank["place"] for rank in four["tp2cp2"]] == [(0, 0, 0), (1, 0, 0)] * 2, "one replica of the samples"
    assert [rank["context"] for rank in four["tp2cp2"]] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert members(four["tp2cp2"][1]) == {"tensor": [0, 1], "context": [1, 3], "gradient": [1, 3]}
    assert [rank["mpu"] for rank in four["tp2cp2"]] == [(0, 2), (1, 2)] * 2, "to DeepSpeed they are data parallel"


def test_dropout_agrees_where_activations_do(four):
    for ranks in four.values():
        outside, inside = [rank["outside"] for rank in ranks], [rank["inside"] for rank in ranks]
        assert outside[0] == outside[1], "tensor-parallel ranks hold the same activations between the layers"
        assert outside[2] == outside[3]
        assert outside[0] != outside[2], "stages, replicas and other positions hold other ones"
        assert len(set(inside)) == 4, "heads differ everywhere"


def test_ranks_agree(four):
    for rank in four["tp2pp2"]:
        assert rank["any"] == (True, False)
        assert rank["broadcast"] == {"from": 0}
        assert rank["gathered"] == ["rank 0", "rank 1", "rank 2", "rank 3"]


def random_states_round_trip() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megagpt.parallel.ranks import start_single_process
    from megagpt.parallel.rng import rng_state, set_rng_state

    def draw() -> list[float]:
        values = [torch.rand(1).item()]
        with get_cuda_rng_tracker().fork():
            values.append(torch.rand(1).item())
        return values

    ranks = start_single_process(seed=3)
    assert (ranks.any(True), ranks.broadcast_object(7), ranks.gather_objects(7)) == (True, 7, [7])
    before = rng_state()
    kept = {name: state.clone() for name, state in before.items()}
    first, second = draw(), draw()
    assert first != second
    assert all(torch.equal(before[name], kept[name]) for name in kept), "the states are copies"
    set_rng_state(before)
    assert [draw(), draw()] == [first, second]
    assert all(torch.equal(before[name], kept[name]) for name in kept), "and stay as they are"


def test_random_states_round_trip(libraries):
    run_ranks(random_states_round_trip, 1)


def modes(plan) -> list[tuple[bool, str | None]]:
    """Whether torch is held to fixed orders, and cuBLAS, with the plan and then with another."""
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    found = []
    for each in (plan, tiny_plan()):
        start_ranks(each, detect_launch())
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    return found


def test_sums_have_a_fixed_order_if_the_run_says_so(libraries, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plan = tiny_plan(sections={"training": {"deterministic": True}})
    (found,) = run_ranks(modes, 1, plan)
    assert found == [(True, ":4096:8"), (False, ":4096:8")]


def test_each_rank_gets_its_own_gpu():
    from megagpt.parallel.ranks import gpu_index

    assert [gpu_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert gpu_index(3, 1) == 0, "Slurm shows each task its own GPU only"
    with pytest.raises(LaunchError, match="local rank 2 has no GPU: this host shows 2; start at most 2 ranks per host"):
        gpu_index(2, 2)


def test_ranks_wait_longer_for_each_other_than_the_watchdog_does():
    from megagpt.parallel.ranks import group_timeout

    def seconds(hang_seconds: float) -> float:
        return group_timeout(tiny_plan(sections={"supervision": {"hang_seconds": hang_seconds}})).total_seconds()

    assert [seconds(60.0), seconds(600.0), seconds(0.0)] == [1800.0, 4200.0, 86400.0]


def timeouts_of_groups(plan) -> list[float]:
    """Of all groups, once the engine is there, which makes some of its own."""
    import torch
    import torch.distributed as dist

    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    build_engine(plan, start_ranks(plan, detect_launch()))
    groups = list(dist.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_groups_of_megatron_core_and_of_deepspeed_wait_as_long(libraries):
    plan = tiny_plan(pp=2, sections={"supervision": {"hang_seconds": 600.0}})
    for timeouts in run_ranks(timeouts_of_groups, 2, plan):
        assert len(timeouts) > 5
        assert set(timeouts) == {4200.0}


def start_at_a_taken_port() -> None:
    import os
    import socket

    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    with socket.socket() as listener:
        listener.bind(("0.0.0.0", int(os.environ["MASTER_PORT"])))
        listener.listen()
        with pytest.raises(LaunchError, match=r"MASTER_PORT=\d+: the port is taken, .* --master_port"):
            start_ranks(tiny_plan(), detect_launch())


def test_a_taken_port_is_explained(libraries):
    run_ranks(start_at_a_taken_port, 1)


@pytest.mark.parametrize(
    ("layout", "given", "expected"),
    [
        ({"tp": 2}, None, "1"),
        ({"tp": 2}, "8", "8"),
        ({"dp": 2}, None, None),
        ({"tp": 2, "zero": 3}, None, None),
    ],
    ids=str,
)
def test_tensor_parallel_collectives_overlap_with_products(monkeypatch, layout, given, expected):
    from megagpt.parallel.ranks import overlap_collectives

    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, "")  # whatever becomes of it is taken back
    monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(name, given)
    overlap_collectives(tiny_plan(**layout))
    assert os.environ.get(name) == expected
