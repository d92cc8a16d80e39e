"""The interface that gloo is told to use."""

import pytest

from megagpt.errors import LaunchError
from megagpt.parallel import interface
from megagpt.parallel.interface import VARIABLE, choose_interface


@pytest.fixture(autouse=True)
def two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "addresses", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"})
    routes = {"node1": "10.1.0.5", "localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "debian": "127.0.1.1"}
    monkeypatch.setattr(interface, "own_address", routes.get)


def test_the_way_to_the_master_is_chosen() -> None:
    environ: dict[str, str] = {}
    assert choose_interface("node1", environ) == "ib0"
    assert environ == {VARIABLE: "ib0"}


@pytest.mark.parametrize("master", ["localhost", "unknown"])
def test_nothing_is_chosen_on_one_host_or_without_a_way(master: str) -> None:
    environ: dict[str, str] = {}
    assert choose_interface(master, environ) is None
    assert environ == {}


OVER_HOSTS = [
    {"SLURM_NNODES": "2"},
    {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2", "WORLD_SIZE": "4"},
    {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "4"},
    {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
    {"LOCAL_SIZE": "2", "WORLD_SIZE": "4"},
]
ON_ONE_HOST = [
    {},
    {"SLURM_NNODES": "1"},
    {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "1"},
    {"SLURM_NNODES": "2", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"},
    {"SLURM_NNODES": "2", "WORLD_SIZE": "1"},
]


@pytest.mark.parametrize("launcher", OVER_HOSTS)
def test_the_masters_own_host_takes_the_way_to_all_others(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]
) -> None:
    """/etc/hosts of Debian and Ubuntu gives the host's own name an address that only the host itself knows."""
    ways: dict[str, str] = {"debian": "127.0.1.1", interface._ELSEWHERE: "10.0.0.5"}
    monkeypatch.setattr(interface, "own_address", ways.get)
    environ = dict(launcher)
    assert choose_interface("debian", environ) == "eth0"
    assert environ[VARIABLE] == "eth0"


@pytest.mark.parametrize("launcher", ON_ONE_HOST)
def test_a_host_that_is_alone_needs_no_interface(launcher: dict[str, str]) -> None:
    assert choose_interface("debian", dict(launcher)) is None
    assert choose_interface("127.0.0.1", {"SLURM_NNODES": "2"}) is None


def test_without_a_default_route_the_only_interface_is_taken_and_one_of_several_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        LaunchError,
        match=r"MASTER_ADDR=debian is a loopback address to .* itself, .*; set GLOO_SOCKET_IFNAME to one of eth0 "
        r"\(10.0.0.5\), ib0 \(10.1.0.5\)",
    ):
        choose_interface("debian", {"SLURM_NNODES": "2"})
    monkeypatch.setattr(interface, "addresses", lambda: {"lo": "127.0.0.1", "ib0": "10.1.0.5"})
    assert choose_interface("debian", {"SLURM_NNODES": "2"}) == "ib0"


def test_the_user_wins_and_is_told_of_a_wrong_name() -> None:
    environ = {VARIABLE: "eth0"}
    assert choose_interface("node1", environ) == "eth0"
    with pytest.raises(
        LaunchError, match=r"GLOO_SOCKET_IFNAME=eth7: .* has no interface eth7, it has eth0 \(10.0.0.5\)"
    ):
        choose_interface("node1", {VARIABLE: "eth7"})


def test_a_real_host_knows_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert interface.addresses()["lo"] == "127.0.0.1"
    assert interface.own_address("127.0.0.1") == "127.0.0.1"
