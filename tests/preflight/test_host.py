"""What a host is found to be, against the plan."""

import errno
import os

import pytest
from gpus import Gpus
from tiny import ADAM, tiny_plan

from megagpt.preflight import host, room
from megagpt.preflight.host import check_devices, check_disk, check_limits


def test_one_host_is_not_asked_to_have_all_ranks(monkeypatch) -> None:
    Gpus([79.0] * 8).plant(monkeypatch)
    finding = check_devices(64, None)
    assert (finding.status, finding.text) == ("OK", "8 x GPU-80G, each computes; 64 ranks need 8 such hosts")
    assert check_devices(64, 8).status == "OK"
    assert check_devices(64, 16).text == "8 GPUs for 16 ranks"


def plan_in(folder):
    return tiny_plan("llama", ADAM, sections={"checkpoint": {"directory": str(folder)}})


def test_checkpoints_that_are_there_need_no_room_again(tmp_path, monkeypatch) -> None:
    plan = plan_in(tmp_path)
    size = plan.checkpoint_bytes
    free = type("usage", (), {"free": 2 * size})
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: free)
    assert check_disk(plan, False).text.startswith("3 checkpoints of ")
    assert check_disk(plan, False).status == "failed"
    for step in (10, 20, 30):  # the oldest is kept for ever, and counts for none that is to come
        (tmp_path / f"step-{step:08}").mkdir()
        (tmp_path / f"step-{step:08}" / "manifest.json").write_text("{}")
        finding = check_disk(plan, False)
    assert finding.status == "OK"
    assert finding.text.startswith("1 checkpoints of ")
    assert " beside 2 that are there, " in finding.text


def test_a_quota_is_seen_though_the_disk_is_free(tmp_path, monkeypatch) -> None:
    def refuse(descriptor, num_bytes):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(room, "_reserve", refuse)
    monkeypatch.setattr(room, "_file_system", lambda folder: "xfs")
    finding = check_disk(plan_in(tmp_path), True)
    assert finding.status == "failed"
    assert finding.text.endswith(" is refused: Disk quota exceeded")
    assert check_disk(plan_in(tmp_path), False).status == "OK", "one host asks for all"


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EFBIG])
def test_room_is_asked_for_and_given_back(tmp_path, monkeypatch, number: int | None) -> None:
    asked = []

    def reserve(descriptor, num_bytes):
        asked.append(num_bytes)
        if number is not None:
            raise OSError(number, os.strerror(number))
        os.truncate(descriptor, num_bytes)

    monkeypatch.setattr(room, "_reserve", reserve)
    monkeypatch.setattr(room, "_file_system", lambda folder: "xfs")
    assert room.room_for(tmp_path, 12345) is None
    assert asked == [12345]
    assert not list(tmp_path.iterdir())


def test_the_file_system_itself_is_asked(tmp_path, monkeypatch) -> None:
    with (tmp_path / "file").open("wb") as file:
        room._reserve(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_size == 1 << 20


def test_open_files_are_compared_with_what_the_plan_takes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host, "needed_files", lambda plan, on_gpus: 3000)
    for files, status in ((2999, "failed"), (4000, "warning"), (5000, "OK")):
        monkeypatch.setattr(host, "most_files", lambda files=files: files)
        assert check_limits(plan_in(tmp_path)).status == status, files
