"""From what the user asks for, and what the partition has, to nodes, ranks per node, CPUs and time."""

from dataclasses import dataclass

from megagpt.errors import ConfigError, LaunchError
from megagpt.plan.layout import divisors
from megagpt.plan.wording import or_list
from megagpt.submission.partition import Partition, parse_time, show_time

GPUS_PER_NODE = 8
"""Where neither the user nor Slurm says how many there are."""
CPUS_PER_RANK = 8


@dataclass(frozen=True)
class Request:
    """What the user says on the command line; None: to be found out."""

    world_size: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    """0: no GPUs, the ranks run on CPUs."""
    ranks_per_node: int | None = None
    """Only without GPUs; with them there is a rank for each."""
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None


@dataclass(frozen=True)
class Shape:
    """What a job of ranks occupies."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        what = "GPU" if self.gpus_per_node else "CPU rank"
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes} x {self.ranks_per_node} {what}{'s' if self.ranks_per_node > 1 else ''}"


def require_positive(request: Request) -> None:
    """Refuse numbers that count nothing.

    Raises:
        ConfigError: there are such; all are reported.
    """
    least = {"world_size": 1, "nodes": 1, "ranks_per_node": 1, "cpus_per_rank": 1, "gpus_per_node": 0}
    problems = [
        f"--{key.replace('_', '-')}={value} is less than {smallest}; give {smallest} or more"
        for key, smallest in least.items()
        if (value := getattr(request, key)) is not None and value < smallest
    ]
    if problems:
        raise ConfigError(problems)


def find_shape(request: Request, partition: Partition | None, fewest_ranks: int) -> Shape:
    """Nodes and ranks per node.

    Args:
        request: what the user says.
        partition: what Slurm says; None: nothing.
        fewest_ranks: how many are started if the user does not say; a node's worth at least is made of it if that many
            nodes are not filled.

    Raises:
        ConfigError: the numbers contradict each other, or the partition does not have as much.
    """
    require_positive(request)
    gpus, ranks = _per_node(request, partition)
    wanted = request.world_size
    if request.nodes is not None:
        if wanted is not None and wanted != request.nodes * ranks:
            raise ConfigError(
                f"--world-size={wanted} is not --nodes x ranks per node = {request.nodes} x {ranks} = "
                f"{request.nodes * ranks}; give one of --world-size and --nodes"
            )
        nodes = request.nodes
    else:
        wanted = wanted or (fewest_ranks if fewest_ranks <= ranks else -(-fewest_ranks // ranks) * ranks)
        if wanted < ranks:
            gpus, ranks = min(gpus, wanted), wanted
        if wanted % ranks:
            sizes = [size for size in divisors(wanted) if size <= ranks]
            raise ConfigError(
                f"--world-size={wanted} does not fill nodes of {ranks} ranks; use {wanted // ranks * ranks} or "
                f"{-(-wanted // ranks) * ranks} ranks, or {or_list(sizes)} per node"
            )
        nodes = wanted // ranks
    if partition is not None and nodes > partition.nodes:
        raise ConfigError(
            f"{nodes} nodes of {ranks} ranks are more than the {partition.nodes} of partition {partition.name}; ask "
            "for fewer ranks or another --partition"
        )
    return Shape(nodes, ranks, gpus, _cpus_per_rank(request, partition, ranks))


def _per_node(request: Request, partition: Partition | None) -> tuple[int, int]:
    """GPUs and ranks of each node."""
    gpus = request.gpus_per_node
    if gpus is None:
        gpus = 0 if request.ranks_per_node else GPUS_PER_NODE if partition is None else partition.gpus_per_node
    if partition is not None and gpus > partition.gpus_per_node:
        have = f"{partition.gpus_per_node} GPUs" if partition.gpus_per_node else "no GPUs"
        fix = partition.gpus_per_node or "0 (with --ranks-per-node)"
        raise ConfigError(
            f"--gpus-per-node={gpus}, but the nodes of partition {partition.name} have {have}; use {fix} or another "
            "--partition"
        )
    if gpus and request.ranks_per_node not in (None, gpus):
        raise ConfigError(
            f"--ranks-per-node={request.ranks_per_node} with --gpus-per-node={gpus}, but each GPU has one rank; remove "
            "--ranks-per-node, or say --gpus-per-node 0 to run on CPUs"
        )
    if not gpus and request.ranks_per_node is None:
        where = "--gpus-per-node=0" if partition is None else f"partition {partition.name} has no GPUs to use"
        raise ConfigError(f"{where}: the number of ranks on each node is not known; give --ranks-per-node")
    return gpus, gpus or request.ranks_per_node or 1


def _cpus_per_rank(request: Request, partition: Partition | None, ranks: int) -> int:
    if partition is None:
        return request.cpus_per_rank or CPUS_PER_RANK
    most = partition.cpus_per_node // ranks
    if (request.cpus_per_rank or 1) > most:
        raise ConfigError(
            f"{ranks} ranks x {request.cpus_per_rank or 1} CPUs are more than the {partition.cpus_per_node} of a node "
            f"of partition {partition.name}; " + (f"use --cpus-per-rank {most} or less" if most else "use fewer ranks")
        )
    return request.cpus_per_rank or min(CPUS_PER_RANK, most)


def find_time(request: Request, partition: Partition | None, usual: str) -> str:
    """The time limit of a job.

    Args:
        request: what the user says.
        partition: what Slurm says.
        usual: of the batch file; taken if the user says nothing, and cut to what the partition allows.

    Raises:
        LaunchError: it is no time, or more than the partition allows.
    """
    limit = None if partition is None else partition.limit_seconds
    if request.time is None:
        return usual if limit is None or parse_time(usual) <= limit else show_time(limit)
    if limit is not None and parse_time(request.time) > limit:
        assert partition is not None
        raise LaunchError(
            f"--time={request.time} is more than partition {partition.name} allows ({show_time(limit)}); use that, and "
            "--chain for what takes longer"
        )
    return show_time(parse_time(request.time))
