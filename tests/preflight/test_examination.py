"""The examination of real ranks, healthy and with planted faults."""

import os
import resource
import socket
from collections import namedtuple
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import ADAM, tiny_plan

from megagpt.preflight.network import Link, judge_links

pytestmark = pytest.mark.usefixtures("libraries")


def plan_in(folder: Path, dataset: dict, **sections):
    tree = {
        "model": {"vocab_size": 300},
        "data": dataset,
        "checkpoint": {"directory": str(folder / "checkpoints")},
        "logging": {"directory": str(folder / "logs")},
    }
    return tiny_plan("llama", ADAM, tp=2, sections=tree | sections)


def examined(plan, fault: str = "") -> list[tuple[str, str, str]]:
    """(check, status, text) of each finding; each rank takes itself for a host of its own, rank 1 has the fault."""
    from megagpt.parallel.launch import detect_launch
    from megagpt.preflight import examine, host, network

    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"node{rank}"  # type: ignore[assignment]
    if rank == 1:
        plant(fault, host, network)
    findings = examine(plan, detect_launch())
    return [(finding.check, finding.status, finding.text) for finding in findings]


def plant(fault: str, host, network) -> None:
    """Make this rank's host ill."""
    if fault == "version":
        right = host.version
        host.version = lambda name: "0.1" if name == "deepspeed" else right(name)
    if fault == "disk":
        usage = namedtuple("usage", "total used free")
        host.shutil.disk_usage = lambda path: usage(100, 99, 1)
    if fault == "files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if fault == "unshared":
        import megagpt.preflight.examination as module

        module._read = lambda path, expected: expected == "node1"
    if fault == "port":
        network._serve = lambda server: server.close()
    if fault == "clock":
        import time

        right_time = time.time
        network.time.time = lambda: right_time() + 40
    if fault == "data":
        import megagpt.preflight.host as module
        from megagpt.errors import DataError

        def missing(*args):
            raise DataError("data.idx: missing")

        module.open_data = missing


def test_healthy_hosts_pass(dataset, tmp_path) -> None:
    findings, _ = run_ranks(examined, 2, plan_in(tmp_path, dataset))
    assert {status for _, status, _ in findings} == {"OK"}, findings
    assert [check for check, *_ in findings] == [
        *("devices", "memory", "shared memory", "limits", "disk", "data", "versions"),
        *("shared: checkpoint.directory", "shared: logging.directory", "network", "clocks", "collectives"),
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".megagpt")]


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("version", "versions", "deepspeed: node1 has 0.1"),
        ("disk", "disk", "node1: 3 checkpoints of "),
        ("files", "limits", "node1: only 512 open files"),
        ("unshared", "shared: checkpoint.directory", "node1 does not see the file of node0 in "),
        ("port", "network", "node0 cannot reach node1: "),
        ("clock", "clocks", "node1 is +40.0 s off node0"),
        ("data", "data", "node1: data.idx: missing"),
    ],
)
def test_a_planted_fault_is_found_and_named(dataset, tmp_path, fault: str, check: str, words: str) -> None:
    findings, _ = run_ranks(examined, 2, plan_in(tmp_path, dataset), fault)
    bad = [(name, text) for name, status, text in findings if status != "OK"]
    assert any(name == check and words in text for name, text in bad), findings


def test_the_plan_against_the_memory_there_is(dataset, tmp_path) -> None:
    from megagpt.preflight.host import check_memory

    plan = plan_in(tmp_path, dataset)
    assert check_memory(plan, 1).status == "OK"
    assert check_memory(plan, 10**9).status == "failed"


def test_a_slow_link_among_fast_ones_is_named() -> None:
    links = [Link("a", "b", None, 9000.0, 0.0), Link("a", "c", None, 900.0, 0.0), Link("b", "c", None, 8800.0, 0.0)]
    findings = judge_links(links, 3)
    assert [finding.status for finding in findings] == ["warning", "OK"]
    assert findings[0].text == "a to c: 900 Mbit/s (median 8,800)"


def test_a_port_that_nobody_serves_is_explained(tmp_path, dataset) -> None:
    from megagpt.parallel.launch import Launch, free_port
    from megagpt.preflight import examine
    from megagpt.preflight.meeting import Meeting

    started = Meeting.__init__
    Meeting.__init__ = lambda self, launch: started(self, launch, 1.0)
    try:
        launch = Launch(1, 1, 2, "127.0.0.1", free_port(), "test")
        (finding,) = examine(plan_in(tmp_path, dataset), launch)
    finally:
        Meeting.__init__ = started
    assert (finding.check, finding.status) == ("meeting", "failed")
    assert f"rank 1 cannot reach 127.0.0.1:{launch.master_port}" in finding.text
