"""The examination of real ranks, healthy and with planted faults."""

import os
import resource
import socket
import time
from collections import namedtuple
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import ADAM, tiny_plan

from megagpt.errors import DataError
from megagpt.preflight import examination, examine, host, network, shared
from megagpt.preflight.meeting import Meeting
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


def examined(plan, fault: str = "", ranks_per_host: int = 1) -> list[tuple[str, str, str]]:
    """(check, status, text) of each finding; so many ranks each take themselves for a host, rank 1 has the fault."""
    from megagpt.parallel.launch import detect_launch

    examination.CHECK_SECONDS, shared._SECONDS, shared._LOOKING_SECONDS = 8.0, 8.0, 2.0
    if fault == "frozen":
        examination._HOST_SECONDS = 4.0
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"node{rank // ranks_per_host}"  # type: ignore[assignment]
    if rank == 1:
        plant(fault, host, network)
    findings = examine(plan, detect_launch(), 60.0)
    return [(finding.check, finding.status, finding.text) for finding in findings]


def plant(fault: str, host, network) -> None:
    """Make this rank's host ill."""
    if fault == "version":
        right = host.version
        host.version = lambda name: "0.1" if name == "deepspeed" else right(name)
    if fault == "disk":
        usage = namedtuple("usage", "total used free")
        host.shutil.disk_usage = lambda path: usage(100, 99, 1)
    if fault == "dead disk":
        host.check_disk = lambda plan, is_first: time.sleep(1000)
    if fault == "files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
    if fault == "very few files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
    if fault == "unshared":
        shared._holds = lambda path, expected: expected == "node1"
    if fault == "dead folder":
        shared._write = lambda path, text: time.sleep(1000)
    if fault == "port":
        network._serve = lambda server: server.close()
    if fault == "clock":
        right_time = time.time
        network.time.time = lambda: right_time() + 40
    if fault == "data":

        def missing(*args):
            raise DataError("data.idx: missing")

        host.open_data = missing
    if fault == "frozen":
        note = Meeting.note

        def note_and_freeze(self, doing):
            note(self, doing)
            if doing == "limits":
                time.sleep(20)

        Meeting.note = note_and_freeze  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_healthy_hosts_pass(dataset, tmp_path, ranks_per_host: int) -> None:
    findings, *others = run_ranks(examined, 2 * ranks_per_host, plan_in(tmp_path, dataset), "", ranks_per_host)
    assert not any(others), "one rank has them all"
    assert {status for _, status, _ in findings} == {"OK"}, findings
    assert [check for check, *_ in findings] == [
        *("devices", "memory", "shared memory", "limits", "disk", "data", "versions"),
        *("shared: checkpoint.directory", "shared: logging.directory", "network", "clocks"),
        *("collectives", "collectives"),
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".megagpt")]


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("version", "versions", "deepspeed: node1 has 0.1"),
        ("disk", "disk", "node1: 3 checkpoints of "),
        ("dead disk", "disk", "node1: this check has not ended within 8 s"),
        ("files", "limits", "node1: only 512 open files, of which a rank takes about "),
        ("very few files", "limits", "node1: only 300 open files, and a rank takes about "),
        ("unshared", "shared: checkpoint.directory", "node1 does not see the file of node0 in "),
        ("dead folder", "shared: checkpoint.directory", "node1 cannot write: that has not ended within 8 s in "),
        ("port", "network", "node0 cannot reach node1: "),
        ("clock", "clocks", "node1 is +40.0 s off node0"),
        ("data", "data", "node1: data.idx: missing"),
        ("frozen", "meeting", "rank 1 on node1 has not come back from limits"),
    ],
)
def test_a_planted_fault_is_found_and_named(dataset, tmp_path, fault: str, check: str, words: str) -> None:
    findings, _ = run_ranks(examined, 2, plan_in(tmp_path, dataset), fault)
    bad = [(name, text) for name, status, text in findings if status != "OK"]
    assert any(name == check and words in text for name, text in bad), findings


def test_a_slow_link_among_fast_ones_is_named() -> None:
    links = [Link("a", "b", None, 9000.0, 0.0), Link("a", "c", None, 900.0, 0.0), Link("b", "c", None, 8800.0, 0.0)]
    findings = judge_links(links, 3, "all 3 pairs of hosts")
    assert [finding.status for finding in findings] == ["warning", "OK"]
    assert findings[0].text == "a to c: 900 Mbit/s (median 8,800)"


def test_a_port_that_nobody_serves_is_explained(tmp_path, dataset) -> None:
    from megagpt.parallel.launch import Launch, free_port

    launch = Launch(1, 0, 2, "127.0.0.1", free_port(), "test")
    (finding,) = examine(plan_in(tmp_path, dataset), launch, 1.0)
    assert (finding.check, finding.status) == ("meeting", "failed")
    assert f"rank 1 cannot reach 127.0.0.1:{launch.master_port}" in finding.text
