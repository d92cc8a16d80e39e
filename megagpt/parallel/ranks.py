"""Process groups: torch.distributed through DeepSpeed, tensor/pipeline/data groups through Megatron-Core."""

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megagpt.errors import LaunchError, MegagptError, RankError
from megagpt.parallel.interface import choose_interface, describe_interfaces
from megagpt.parallel.launch import Launch
from megagpt.parallel.meeting import meet
from megagpt.plan import Plan
from megagpt.plan.config import PATIENCE_WITH_SLOW_PHASES

FIRST_TIMEOUT = timedelta(minutes=10)
"""Of the collectives before the watchdog looks on: that the network between ranks is broken shows in the first one."""
SHORTEST_GROUP_TIMEOUT = timedelta(minutes=30)
LONGEST_GROUP_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job and the groups that it belongs to.

    Global ranks are laid out as Megatron-Core does by default: tensor parallel fastest, then context parallel, then
    data parallel, pipeline slowest. Two notions of data parallelism must not be mixed up: `data_*` says which samples
    a rank sees; `gradient_*` says over which ranks gradients are averaged and ZeRO cuts its states, which is data x
    context parallel, since a context-parallel rank sees other positions of the same samples.
    Neighbouring data-parallel ranks share the experts.
    """

    rank: int
    world_size: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    gradient_rank: int
    gradient_size: int
    tensor_group: Any
    context_group: Any
    data_group: Any
    gradient_group: Any
    pipeline_group: Any
    expert_rank: int
    """Which part of each layer's experts this rank has."""
    expert_size: int
    expert_group: Any
    """The data-parallel ranks that together have all experts."""
    expert_data_group: Any
    """The data-parallel ranks that have the same experts."""

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def mpu(self) -> "ModelParallelUnit":
        """What DeepSpeedEngine asks about model parallelism."""
        return ModelParallelUnit(self)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one of them."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def sum_over_replicas(self, number: int) -> int:
        """The sum of a number over the data-parallel ranks that have this rank's place in their replicas."""
        if self.data_size == 1:
            return number
        total = torch.tensor(number, device=self.device)
        dist.all_reduce(total, group=self.data_group)
        return int(total.item())

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


class ModelParallelUnit:
    """The `mpu` object of DeepSpeedEngine: model parallel means tensor parallel, there are no pipeline stages, and what
    it calls data parallel is data x context parallel."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    def get_model_parallel_rank(self) -> int:
        return self._ranks.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._ranks.tensor_size

    def get_model_parallel_group(self) -> Any:
        return self._ranks.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._ranks.gradient_rank

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.gradient_size

    def get_data_parallel_group(self) -> Any:
        return self._ranks.gradient_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def start_ranks(plan: Plan, launch: Launch, problem: RankError | None = None) -> Ranks:
    """Join the job's process groups and seed this rank.

    Args:
        plan: the layout.
        launch: this process's rank as the launcher gave it.
        problem: what this rank has met, for which the job must end: no rank is left to wait for it.

    Raises:
        LaunchError: there are more ranks than GPUs on this host, or the ranks cannot meet at the master's port.
        MissingRanksError: on the first rank: others have not come there.
        RankError: the problem; or another rank tells why the job ends.
    """
    from megagpt.parallel.without_cuda import prepare_deepspeed, support_hosts_without_cuda

    prepare_deepspeed()
    support_hosts_without_cuda()
    import deepspeed

    launch.export()
    fix_order_of_sums(plan.run.training.deterministic)
    own_problem: MegagptError | None = problem
    try:
        choose_interface(launch.master_addr)
        if torch.cuda.is_available():
            _choose_gpu(plan, launch)
    except LaunchError as error:
        own_problem = problem or error
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            meeting = meet(launch, own_problem)
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=FIRST_TIMEOUT)
            del meeting  # the process groups keep the port open now
        except dist.DistError as error:
            raise LaunchError(_network_advice(launch, error)) from None
    elif own_problem is not None:
        raise own_problem
    return _join_groups(
        plan.tensor_parallel_size,
        plan.context_parallel_size,
        plan.pipeline_parallel_size,
        plan.expert_parallel_size,
        plan.run.training.seed,
    )


def fix_order_of_sums(wanted: bool) -> None:
    """Have torch use only kernels that give the same bits each time, or, as it does by itself, the fastest ones.

    Args:
        wanted: `training.deterministic`. cuBLAS heeds it if this process has not used it yet.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        import torch._inductor.config as inductor

        if hasattr(inductor, "deterministic"):  # no kernel is chosen by how long it takes
            inductor.deterministic = True
    torch.use_deterministic_algorithms(wanted)


def overlap_collectives(plan: Plan) -> None:
    """Have the GPU start a tensor-parallel collective before the product that is launched after it, so that the two run
    side by side: Megatron-Core relies on a single queue for that. ZeRO 3 wants several for its own collectives. To be
    called before the device is used; a variable that is set stays as it is."""
    if plan.tensor_parallel_size > 1 and plan.zero_stage < 3:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def group_timeout(plan: Plan) -> timedelta:
    """How long ranks wait for each other in a collective: longer than the watchdog, which tells who holds up whom."""
    longest = PATIENCE_WITH_SLOW_PHASES * plan.run.supervision.hang_seconds
    if longest == 0:
        return LONGEST_GROUP_TIMEOUT
    return max(SHORTEST_GROUP_TIMEOUT, timedelta(seconds=longest) + timedelta(minutes=10))


def set_group_timeout(plan: Plan) -> None:
    """Have all groups wait as long as the first one, those too that Megatron-Core and DeepSpeed have made."""
    distributed, timeout = dist.distributed_c10d, group_timeout(plan)
    for group in list(distributed._world.pg_map):
        distributed._set_pg_timeout(timeout, group)


def _network_advice(launch: Launch, error: Exception) -> str:
    where = f"MASTER_ADDR={launch.master_addr} MASTER_PORT={launch.master_port}"
    if "EADDRINUSE" in str(error):
        return (
            f"{where}: the port is taken, perhaps by another job of this host; choose a free one with --master_port "
            "(deepspeed, torchrun) or by exporting MASTER_PORT (srun, mpirun)"
        )
    reason = str(error).strip().splitlines()[0]
    return (
        f"{where}: rank {launch.rank} of {launch.world_size} could not meet the others there ({reason}); check that "
        "it is rank 0's host, that hosts reach each other on this port, and that all ranks were started; this host's "
        f"interfaces are {describe_interfaces()} (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose one)"
    )


def _choose_gpu(plan: Plan, launch: Launch) -> None:
    overlap_collectives(plan)
    index = gpu_index(launch.local_rank, torch.cuda.device_count())
    torch.cuda.set_device(index)
    # DeepSpeed takes the local rank for the number of the device, and compares it with Open MPI's.
    for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & set(os.environ):
        os.environ[name] = str(index)


def gpu_index(local_rank: int, num_gpus: int) -> int:
    """Which of the GPUs that this process sees is its own.

    Args:
        local_rank: this process's number on its host.
        num_gpus: GPUs that the process sees. A single one is taken for its own, as Slurm's --gpus-per-task shows each
            task nothing but its GPU; NCCL refuses to start if ranks share it after all.

    Raises:
        LaunchError: there is no GPU for this rank.
    """
    if num_gpus == 1:
        return 0
    if local_rank >= num_gpus:
        raise LaunchError(
            f"local rank {local_rank} has no GPU: this host shows {num_gpus}; start at most {num_gpus} ranks per host, "
            "or show more of them (CUDA_VISIBLE_DEVICES)"
        )
    return local_rank


def start_single_process(seed: int = 0) -> Ranks:
    """Groups of one rank for tools that run the model in one process; opens no port and needs no launcher."""
    from megagpt.parallel.without_cuda import support_hosts_without_cuda

    support_hosts_without_cuda()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return _join_groups(1, 1, 1, 1, seed)


def _join_groups(tensor_size: int, context_size: int, pipeline_size: int, expert_size: int, seed: int) -> Ranks:
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=pipeline_size,
            context_parallel_size=context_size,
            expert_model_parallel_size=expert_size,
        )
    cuda = torch.cuda.is_available()
    ranks = Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        gradient_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        gradient_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        gradient_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
        expert_data_group=parallel_state.get_expert_data_parallel_group(),
    )
    # Dropout outside tensor-parallel regions must agree across TP ranks and differ wherever other stages, samples or
    # positions are.
    place = f"{seed}/{ranks.pipeline_rank}/{ranks.gradient_rank}"
    stage_seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "little") >> 1
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
    return ranks


def release_groups() -> None:
    """Forget the layout, so that `start_ranks` can give the same processes another one."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def stop_ranks() -> None:
    """Leave the process groups; without it a rank can abort at exit and turn a success into a failure."""
    release_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
