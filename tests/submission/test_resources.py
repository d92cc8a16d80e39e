"""From what is asked for and what there is to nodes, ranks, CPUs and time."""

import pytest

from megagpt.errors import ConfigError, LaunchError
from megagpt.submission.partition import Partition
from megagpt.submission.resources import Request, find_shape, find_time

GPUS = Partition("gpu", 86400, 4, 32, 8)
CPUS = Partition("cpu", None, 4, 16, 0)


@pytest.mark.parametrize(
    ("request_", "partition", "fewest", "expected"),
    [
        (Request(nodes=2), GPUS, 1, (2, 8, 8, 4)),
        (Request(world_size=16), GPUS, 1, (2, 8, 8, 4)),
        (Request(world_size=4), GPUS, 1, (1, 4, 4, 8)),
        (Request(nodes=3, gpus_per_node=4), GPUS, 1, (3, 4, 4, 8)),
        (Request(), GPUS, 2, (1, 2, 2, 8)),  # one copy of the model
        (Request(), GPUS, 12, (2, 8, 8, 4)),  # nodes are filled
        (Request(nodes=2), None, 1, (2, 8, 8, 8)),  # Slurm says nothing
        (Request(nodes=2, ranks_per_node=2), CPUS, 1, (2, 2, 0, 8)),
        (Request(nodes=2, ranks_per_node=2, cpus_per_rank=3), CPUS, 1, (2, 2, 0, 3)),
        (Request(world_size=8, gpus_per_node=0, ranks_per_node=4), None, 1, (2, 4, 0, 8)),
    ],
)
def test_what_is_not_said_follows(request_, partition, fewest, expected) -> None:
    shape = find_shape(request_, partition, fewest)
    assert (shape.nodes, shape.ranks_per_node, shape.gpus_per_node, shape.cpus_per_rank) == expected


@pytest.mark.parametrize(
    ("request_", "partition", "words"),
    [
        (Request(nodes=0), None, "--nodes=0 is less than 1; give 1 or more"),
        (Request(nodes=1, gpus_per_node=-1), None, "--gpus-per-node=-1 is less than 0"),
        (Request(nodes=2, world_size=8), GPUS, "--world-size=8 is not --nodes x ranks per node = 2 x 8 = 16"),
        (
            Request(world_size=12),
            GPUS,
            "fill nodes of 8 ranks; use 8 or 16 ranks, or 1, 2, 3, 4 or 6 per node",
        ),
        (Request(nodes=5), GPUS, "5 nodes of 8 ranks are more than the 4 of partition gpu"),
        (Request(nodes=1, gpus_per_node=16), GPUS, "--gpus-per-node=16, but the nodes of partition gpu have 8 GPUs"),
        (Request(nodes=1, gpus_per_node=2), CPUS, "partition cpu have no GPUs; use 0"),
        (Request(nodes=1), CPUS, "partition cpu has no GPUs to use: the number of ranks on each node is not known"),
        (Request(nodes=1, gpus_per_node=4, ranks_per_node=2), GPUS, "each GPU has one rank; remove --ranks-per-node"),
        (Request(nodes=1, cpus_per_rank=5), GPUS, "more than the 32 of a node of partition gpu; use --cpus-per-rank 4"),
        (Request(nodes=1, ranks_per_node=17), CPUS, "17 ranks x 1 CPUs are more than the 16 of a node"),
    ],
)
def test_what_does_not_fit_is_named(request_, partition, words) -> None:
    with pytest.raises(ConfigError) as caught:
        find_shape(request_, partition, 1)
    assert words in str(caught.value)


def test_the_time_is_that_of_the_file_or_what_the_partition_allows() -> None:
    short = Partition("short", 1800, 1, 8, 2)
    assert find_time(Request(), GPUS, "12:00:00") == "12:00:00"
    assert find_time(Request(), short, "12:00:00") == "00:30:00"
    assert find_time(Request(time="2-12"), None, "12:00:00") == "2-12:00:00"
    with pytest.raises(LaunchError, match=r"--time=60 is more than partition short allows \(00:30:00\); use that, and"):
        find_time(Request(time="60"), short, "12:00:00")
