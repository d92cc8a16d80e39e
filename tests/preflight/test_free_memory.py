"""The plan's estimate against the memory of GPUs, of hosts and of control groups."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from gpus import GIB, Gpus
from tiny import ADAM, tiny_plan

from megagpt.cgroup import Room, smallest_limit, tightest_room
from megagpt.plan import deepspeed_config_from_dict, make_plan
from megagpt.preflight import memory
from megagpt.preflight.memory import check_memory


@dataclass
class Needy:
    """Stand-in for a plan that takes so much memory on each rank, and one stage of it."""

    gib: float
    offloaded: float = 0
    copied: float = 0
    world_size: int = 64

    @property
    def memory(self) -> "Needy":
        return self

    @property
    def memory_per_stage(self) -> "list[Needy]":
        return [self]

    @property
    def total(self) -> int:
        return int(self.gib * GIB)

    @property
    def host(self) -> int:
        return int(self.offloaded * GIB)

    @property
    def save_copy_bytes(self) -> int:
        return int(self.copied * GIB)


@pytest.fixture
def plant(monkeypatch):
    """Gives the host so many GiB of memory, and its control group a limit."""

    def planted(available: float, room: Room | None = None) -> None:
        monkeypatch.setattr(
            memory.psutil, "virtual_memory", lambda: type("memory", (), {"available": int(available * GIB)})
        )
        monkeypatch.setattr(memory, "tightest_room", lambda: room)

    planted(1000)
    return planted


def test_one_host_need_not_have_memory_for_all_ranks(monkeypatch, plant) -> None:
    Gpus([79.0] * 8).plant(monkeypatch)
    assert check_memory(Needy(40), None).status == "OK"
    plant(410)
    finding = check_memory(Needy(40, offloaded=45), None)  # a rank per GPU
    assert finding.text.partition("; ")[2] == (
        "360.00 GiB of host memory for 8 ranks, each with 45.00 for ZeRO's offload, 410.00 GiB are free"
    )
    assert (finding.status, finding.advice) == ("OK", "")


def test_memory_that_another_process_has_is_seen_on_each_gpu(monkeypatch, plant) -> None:
    Gpus([79.0, 79.0, 10.5, 79.0]).plant(monkeypatch)
    finding = check_memory(Needy(40), 4)
    assert finding.status == "failed"
    assert finding.text == "40.00 GiB estimated per rank, 10.50 of 80.00 GiB are free on GPU 2"
    assert finding.advice == "nvidia-smi names the process that has the rest: end it"
    assert "tools/plan.py" in check_memory(Needy(100), 4).advice
    Gpus([79.0] * 4).plant(monkeypatch)
    assert check_memory(Needy(40), 4).status == "OK"
    assert check_memory(Needy(75), 4).status == "warning"


def test_memory_of_a_host_without_gpus(plant) -> None:
    plant(100)
    assert check_memory(Needy(10), 8).status == "OK"
    assert check_memory(Needy(10), 16).status == "failed"
    finding = check_memory(Needy(10), None)
    assert finding.status == "warning"
    assert finding.text == "10.00 GiB estimated per rank, 100.00 GiB are free: 10 of 64 ranks fit on this host"
    assert check_memory(Needy(101), None).status == "failed"
    assert check_memory(Needy(1), None).text.endswith("1.56 GiB of free memory per rank if all 64 run on this host")


def test_host_memory_beside_gpus_is_looked_at_for_all_ranks_of_the_host(monkeypatch, plant) -> None:
    Gpus([79.0] * 8).plant(monkeypatch)
    plant(390)
    needy = Needy(40, offloaded=45, copied=5)
    finding = check_memory(needy, 8)
    assert finding.status == "failed"
    assert finding.text == (
        "40.00 GiB estimated per rank, 79.00 of 80.00 GiB are free on GPU 0; 400.00 GiB of host memory for 8 ranks, "
        "each with 45.00 for ZeRO's offload and 5.00 for the copy of a save, 390.00 GiB are free"
    )
    ways = (
        "take more hosts, or fewer ranks on each; or switch off offload (zero_optimization, 45.00 GiB per rank); or "
        "save without a copy (checkpoint.asynchronous=false, 5.00 GiB per rank)"
    )
    assert finding.advice == ways
    assert check_memory(needy, 4).status == "OK"
    assert check_memory(Needy(40, copied=45), 8).status == "warning", "360 of 390 GiB are just enough"
    assert "tools/plan.py" in check_memory(Needy(100, offloaded=45, copied=5), 8).advice
    plant(1000, Room(300 * GIB, "/sys/fs/cgroup/job_7", 400 * GIB))
    finding = check_memory(needy, 8)
    assert finding.text.endswith(" 300.00 GiB are free under the limit of /sys/fs/cgroup/job_7")
    assert finding.advice == f"allow more (Slurm: --mem; a container: its limit), or {ways}"


def test_without_gpus_offload_and_the_copy_of_a_save_are_in_the_same_memory(plant) -> None:
    plant(100)
    assert check_memory(Needy(10), 8).status == "OK"
    finding = check_memory(Needy(10, offloaded=2, copied=1), 8)
    assert (finding.status, finding.text) == (
        "failed",
        "13.00 GiB estimated per rank with 2.00 for ZeRO's offload and 1.00 for the copy of a save, 12.50 GiB of free "
        "memory per rank",
    )
    assert "tools/plan.py; or take more hosts" in finding.advice
    plant(100, Room(50 * GIB, "/sys/fs/cgroup/job_7", 400 * GIB))
    finding = check_memory(Needy(10), 8)
    assert finding.status == "failed"
    assert finding.text.endswith(", 6.25 GiB of free memory per rank under the limit of /sys/fs/cgroup/job_7")
    assert finding.advice.startswith("allow more (Slurm: --mem; a container: its limit), or ")
    plant(100, Room(200 * GIB, "/sys/fs/cgroup/job_7", 400 * GIB))
    assert check_memory(Needy(10), 8).status == "OK", "a limit above what is free is none"


@pytest.mark.parametrize(
    ("checkpoint", "offload", "is_copied"),
    [
        ({"directory": "checkpoints"}, "cpu", True),
        ({"directory": "checkpoints"}, "nvme", False),
        ({"directory": "checkpoints", "asynchronous": False}, "cpu", False),
        ({}, "cpu", False),
    ],
)
def test_a_plan_tells_what_the_copy_of_a_save_takes(checkpoint: dict, offload: str, is_copied: bool) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": offload, "nvme_path": "/tmp"}}
    run = tiny_plan("llama", ADAM, sections={"checkpoint": checkpoint})
    plan = make_plan(run.run, deepspeed_config_from_dict({**run.deepspeed.raw, "zero_optimization": zero}), 2)
    assert plan.save_copy_bytes == (plan.checkpoint_bytes // 2 if is_copied else 0)


def group(folder: Path, prefix: str = "memory.", **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{prefix}{name}").write_text(text + "\n")


def test_the_tightest_of_nested_groups_counts(tmp_path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/slurm/job_7/step_0\n")
    stat = "anon 5\ninactive_file 100\nactive_file 20\nshmem 7"
    group(tmp_path / "slurm/job_7/step_0", max="max", current="500", stat=stat)
    group(tmp_path / "slurm/job_7", max="1000", current="600", stat=stat)
    group(tmp_path / "slurm", max="9000", current="700", stat=stat)
    assert tightest_room(tmp_path, own) == Room(520, str(tmp_path / "slurm/job_7"), 1000)
    assert smallest_limit(tmp_path, own) == 1000
    group(tmp_path / "slurm/job_7", max="400", current="600", stat=stat)
    assert tightest_room(tmp_path, own) == Room(0, str(tmp_path / "slurm/job_7"), 400), "nothing is left"


def test_the_older_version_of_groups_is_read_too(tmp_path) -> None:
    own = tmp_path / "own"
    own.write_text("4:cpu,memory:/job\n3:cpuset:/\n0::/\n")
    stat = "cache 5\ntotal_inactive_file 100\ntotal_active_file 20"
    group(tmp_path / "memory/job", limit_in_bytes="1000", usage_in_bytes="600", stat=stat)
    assert tightest_room(tmp_path, own) == Room(520, str(tmp_path / "memory/job"), 1000)


@pytest.mark.parametrize("path", ["/docker/1234", "/../../system.slice"])
def test_a_container_has_its_group_at_the_mount(tmp_path, path: str) -> None:
    own = tmp_path / "own"
    own.write_text(f"0::{path}\n")
    assert tightest_room(tmp_path, own) is None
    assert tightest_room(tmp_path, tmp_path / "absent") is None
    assert smallest_limit(tmp_path, tmp_path / "absent") is None
    group(tmp_path, max="1000", current="600", stat="inactive_file 0")
    assert tightest_room(tmp_path, own) == Room(400, str(tmp_path), 1000)
