"""Ranks that are not heard any more are judged by those of their host, if there are any, and else from afar."""

import time
from pathlib import Path

import pytest

from megagpt.supervise.beats import Beat, BeatFolder
from megagpt.supervise.pulse import Phase
from megagpt.supervise.watchdog import Limits, Place, Watchdog

SILENT = 0.4


class Watched:
    """Rank 0 of three, the others on another host; time passes only in `pass_time`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self._now)
        self._folder = BeatFolder(folder)
        place = Place(rank=0, world_size=3, stage=0, data=0, context=0, tensor=0)
        limits = Limits(stuck=600.0, silent=SILENT)
        self.watchdog = Watchdog(self._folder, place, limits, say=lambda text: None, leave=lambda code: None)
        self._number = 0

    def pass_time(self, share: float, beating: tuple[int, ...]):
        """Let a share of the bearable silence pass; what is then said of the ranks, of which some have beaten."""
        self._now += share * SILENT
        self._number += 1
        self.watchdog._beat()
        for rank in beating:
            self._folder.write(
                Beat(
                    rank=rank, host="elsewhere", pid=1, pid_started=1, stage=0, data=rank, context=0, tensor=0, step=5,
                    microbatch=0, phase=Phase.FORWARD, count=9, number=self._number, still_for=0.0, is_stuck=False,
                )
            )  # fmt: skip
        return self.watchdog._judge()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_its_neighbours_come_first(watched):
    assert watched.pass_time(0.0, beating=(1, 2)) is None
    assert watched.pass_time(1.2, beating=(2,)) is None, "rank 2 sees what has become of rank 1"
    verdict = watched.pass_time(1.0, beating=(2,))
    assert verdict.culprits == [1], "but it has said nothing"


def test_a_host_that_is_lost_is_judged_at_once(watched):
    assert watched.pass_time(0.0, beating=(1, 2)) is None
    verdict = watched.pass_time(1.2, beating=())
    assert verdict.culprits == [1, 2]
    assert "nothing is heard of it: its host or the way to the shared folder is lost" in verdict.text
