"""Times and partitions as Slurm writes them."""

from pathlib import Path

import pytest

from megagpt.errors import LaunchError
from megagpt.submission.partition import Partition, find_partition, parse_time, show_time

SINFO = """main*|1-00:00:00|30|64|gpu:a100:8(S:0-1)
main*|1-00:00:00|2|48+|gpu:h100:4,shard:8
cpu|infinite|10|128|(null)
short|30:00|1|16|gpu:2
"""


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on PATH; what it prints can be changed."""
    (tmp_path / "told").write_text(SINFO)
    stub = tmp_path / "sinfo"
    stub.write_text(f"#!/bin/sh\ncat {tmp_path}/told\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "told"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("1-1:30", 91800), ("1-1:30:5", 91805)],
)
def test_times_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds
    assert parse_time(show_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["24h", "", "0", "1:2:3:4", "-5", "2-", "infinite"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match=f"--time={text} is no time that Slurm knows"):
        parse_time(text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, Partition("main", 86400, 32, 48, 8)),
        ("cpu", Partition("cpu", None, 10, 128, 0)),
        ("short", Partition("short", 1800, 1, 16, 2)),
        ("cpu,short", None),
    ],
)
def test_a_partition_is_all_its_nodes(sinfo: Path, name: str | None, expected: Partition | None) -> None:
    assert find_partition(name) == expected


def test_an_unknown_partition_is_answered_with_those_that_are(sinfo: Path) -> None:
    with pytest.raises(LaunchError, match="--partition=gpu is none of this cluster's; use cpu, main or short"):
        find_partition("gpu")


@pytest.mark.parametrize("told", ["", "slurm is not configured\n"])
def test_nothing_is_known_where_slurm_says_nothing(sinfo: Path, told: str) -> None:
    sinfo.write_text(told)
    assert find_partition("gpu") is None


def test_nothing_is_known_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_partition("gpu") is None
