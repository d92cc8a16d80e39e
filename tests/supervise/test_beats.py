"""Folders of starts: the last few are kept."""

import calendar
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megagpt.supervise.beats import BeatFolder, starts
from megagpt.supervise.watch import _folder


def test_the_folders_last_written_to_are_kept(tmp_path: Path) -> None:
    # A host whose clock is ahead has named some of them.
    names = ("20300101-1", "20260101-2", "20260102-3", "20300101-4", "20260103-5")
    for age, name in enumerate(reversed(names)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    BeatFolder(tmp_path / "20260104-6").create()
    assert [path.name for path in starts(tmp_path)] == [*names[-3:], "20260104-6"]


def test_the_one_just_made_stays_whatever_its_clock_says(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"20300101-{number}").mkdir()
        os.utime(tmp_path / f"20300101-{number}", (4e9 + number, 4e9 + number))
    BeatFolder(tmp_path / "20260104-6").create()
    assert sorted(path.name for path in starts(tmp_path)) == ["20260104-6", *(f"20300101-{n}" for n in (3, 4, 5))]


def test_names_do_not_depend_on_the_time_zone_of_the_first_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervision = SimpleNamespace(silent_seconds=1.0)
    plan = SimpleNamespace(run=SimpleNamespace(shared_folder=str(tmp_path), supervision=supervision))
    ranks = SimpleNamespace(rank=0, world_size=2, broadcast_object=lambda value: value, barrier=lambda: None)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        name = _folder(plan, ranks).folder.name
    finally:
        monkeypatch.undo()
        time.tzset()
    told = calendar.timegm(time.strptime(name.rpartition("-")[0], "%Y%m%d-%H%M%S"))
    assert abs(told - time.time()) < 60
