"""The interface that gloo is told to use."""

import pytest

from megagpt.errors import LaunchError
from megagpt.parallel import interface
from megagpt.parallel.interface import VARIABLE, choose_interface


@pytest.fixture(autouse=True)
def two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "addresses", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"})
    routes = {"node1": "10.1.0.5", "localhost": "127.0.0.1"}
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
