"""Every rank finds the same meeting point from its own variables, and says so clearly where it cannot."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megagpt.errors import LaunchError
from megagpt.parallel import master
from megagpt.parallel.launch import detect_launch
from megagpt.parallel.master import DEFAULT_PORT, expand_hostlist, find_master


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("a,b-2,c.example.org", ["a", "b-2", "c.example.org"]),
        ("rack[1-2]node[1-2]", ["rack1node1", "rack1node2", "rack2node1", "rack2node2"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_host_lists_expand_as_scontrol_does(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize(
    "text", ["node[1-3", "node1-3]", "node[3-1]", "node[a-c]", "node[]", "n[1-2]]", "n[1][", "n[1,]"]
)
def test_malformed_host_lists_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match=r"host list .* set MASTER_ADDR"):
        expand_hostlist(text)


def srun_task(rank: int, **variables: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_NTASKS": "4",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "0",
        **variables,
    }


def mpi_process(rank: int, size: int, local_size: int, **variables: str) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local_size),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "PMIX_NAMESPACE": "1088421889",
        **variables,
    }


def test_srun_over_two_nodes_meets_on_the_first_node_of_the_step() -> None:
    nodes = {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NODELIST": "gpu[01-08]", "SLURM_NNODES": "2"}
    launches = [detect_launch(srun_task(rank, **nodes)) for rank in range(4)]
    assert {(launch.master_addr, launch.master_port) for launch in launches} == {("gpu07", 23456)}
    assert [(launch.rank, launch.local_rank, launch.world_size) for launch in launches] == [
        (0, 0, 4),
        (1, 1, 4),
        (2, 0, 4),
        (3, 1, 4),
    ]


def test_the_nodes_of_the_job_stand_in_for_those_of_the_step() -> None:
    assert detect_launch(srun_task(1, SLURM_JOB_NODELIST="a[3-4]")).master_addr == "a3"


@pytest.mark.parametrize("variables", [{"SLURM_STEP_NODELIST": "gpu07"}, {"SLURM_NNODES": "1"}])
def test_srun_on_one_node_needs_no_network(variables: dict[str, str]) -> None:
    assert detect_launch(srun_task(3, **variables)).master_addr == "127.0.0.1"


def test_srun_without_a_node_list_asks_for_the_address() -> None:
    with pytest.raises(LaunchError, match=r"MASTER_ADDR is not set, and srun .*scontrol show hostnames"):
        detect_launch(srun_task(0))


def test_steps_of_a_job_and_jobs_in_a_row_have_their_own_ports() -> None:
    ports = {
        detect_launch(
            srun_task(0, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step), SLURM_NNODES="1", SLURM_STEP_NODELIST="n1")
        ).master_port
        for job in range(9998, 10003)
        for step in range(4)
    }
    assert len(ports) == 20
    assert all(20000 <= port < 30000 for port in ports)


def test_mpirun_on_one_host_needs_no_address() -> None:
    launches = [detect_launch(mpi_process(rank, 2, 2)) for rank in range(2)]
    assert launches[0].master_addr == launches[1].master_addr == "127.0.0.1"
    assert launches[0].master_port == launches[1].master_port
    other = detect_launch(mpi_process(0, 2, 2, PMIX_NAMESPACE="prterun-host-771@1"))
    assert other.master_port != launches[0].master_port
    assert 20000 <= other.master_port < 30000


def test_mpirun_inside_slurm_is_not_taken_for_srun() -> None:
    variables = srun_task(0) | {"SLURM_NNODES": "1"}
    launch = detect_launch(variables | mpi_process(1, 2, 2))
    assert (launch.launcher, launch.rank, launch.world_size) == ("mpirun", 1, 2)
    assert launch.master_port == detect_launch(mpi_process(0, 2, 2)).master_port


def test_mpirun_over_hosts_asks_for_the_address() -> None:
    with pytest.raises(LaunchError, match="mpirun -x MASTER_ADDR=HOST"):
        detect_launch(mpi_process(0, 4, 2))
    assert detect_launch(mpi_process(0, 4, 2, MASTER_ADDR="head")).master_addr == "head"


def test_what_is_set_wins() -> None:
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    for variables in (srun_task(0, SLURM_STEP_NODELIST="n[1-2]"), mpi_process(0, 2, 2)):
        launch = detect_launch(variables | given)
        assert (launch.master_addr, launch.master_port) == ("head", 1234)


def test_ranks_set_by_hand_need_an_address_but_no_port() -> None:
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        find_master({}, "torchrun or deepspeed", 2)
    assert find_master({"MASTER_ADDR": "head"}, "torchrun or deepspeed", 2) == ("head", DEFAULT_PORT)
    assert find_master({}, "torchrun or deepspeed", 1) == ("127.0.0.1", DEFAULT_PORT)


@pytest.mark.parametrize("key", ["MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_variables_that_are_no_numbers_are_named(key: str) -> None:
    with pytest.raises(LaunchError, match=f"{key}='soon' is not an integer"):
        detect_launch(srun_task(0, SLURM_NNODES="1") | {key: "soon"})


def test_mpirun_inside_an_allocation_starts_on_its_first_host() -> None:
    environ = mpi_process(3, 4, 2, SLURM_JOB_NODELIST="node[7-8]")
    assert find_master(environ, "mpirun", 4)[0] == "node7"
    mpich = {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"}
    assert find_master(mpich, "mpirun (MPICH)", 4)[0] == "127.0.0.1"


def test_mpirun_over_hosts_asks_mpi_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for mpi4py: rank 0's word is what all others get."""
    said: list[str | None] = []
    calls: list[str] = []

    class World:
        def __init__(self, rank: int):
            self.Get_rank = lambda: rank

        def bcast(self, value: str | None) -> str | None:
            said.append(value)
            return said[0]

    mpi4py: Any = ModuleType("mpi4py")
    mpi4py.rc = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    monkeypatch.setattr(master, "_own_address", lambda: "10.0.0.7")
    for rank in (0, 3):
        mpi4py.MPI = SimpleNamespace(
            COMM_WORLD=World(rank), Init=lambda: calls.append("init"), Finalize=lambda: calls.append("finalize")
        )
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER"))}
        with mock.patch.dict(os.environ, environ | mpi_process(rank, 4, 2), clear=True):
            assert detect_launch().master_addr == "10.0.0.7"
    assert said == ["10.0.0.7", None]
    assert calls == ["init", "finalize"] * 2
    assert mpi4py.rc.initialize is False


def test_the_own_address_is_one_that_other_hosts_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master, "addresses", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.5"})
    monkeypatch.setattr(master, "outer_address", lambda: None)
    monkeypatch.setattr(master.socket, "gethostbyname", lambda name: "127.0.1.1")
    assert master._own_address() == "10.0.0.5"
    monkeypatch.setattr(master, "outer_address", lambda: "10.2.0.5")
    assert master._own_address() == "10.2.0.5"
    monkeypatch.setattr(master.socket, "gethostbyname", lambda name: "10.1.0.5")
    assert master._own_address() == "10.1.0.5"
