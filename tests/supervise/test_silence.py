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
        self._now = self._went_on = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self._now)
        self._folder = BeatFolder(folder)
        place = Place(rank=0, world_size=3, stage=0, data=0, context=0, tensor=0)
        limits = Limits(stuck=600.0, silent=SILENT)
        self.watchdog = Watchdog(self._folder, place, limits, say=lambda text: None, leave=lambda code: None)
        self._number = 0

    def pass_time(self, share: float, beating: tuple[int, ...], go_on: bool = False):
        """Let a share of the bearable silence pass; what is then said of the ranks, of which some have beaten.

        Args:
            share: of the silence.
            beating: ranks that do.
            go_on: whether they and rank 0 have just entered another phase.
        """
        self._now += share * SILENT
        self._number += 1
        if go_on:
            self._went_on = self._now
            self.watchdog.pulse.enter(Phase.FORWARD)
        self.watchdog._beat()
        for rank in beating:
            self._write(rank, Phase.FORWARD)
        return self.watchdog._judge()

    def leave(self, rank: int) -> None:
        """A rank's last beat, before any time has passed."""
        self._number += 1
        self._write(rank, Phase.LEFT)

    def _write(self, rank: int, phase: Phase) -> None:
        self._folder.write(
            Beat(
                rank=rank, host="elsewhere", pid=1, pid_started=1, stage=0, data=rank, context=0, tensor=0, step=5,
                microbatch=0, phase=phase, count=9, number=self._number, still_for=self._now - self._went_on,
                is_stuck=False,
            )
        )  # fmt: skip


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_each_beat_is_read_once_in_a_round(watched, monkeypatch):
    watched.pass_time(0.0, beating=(1, 2))
    read, asked = BeatFolder.read, []

    def counted(self, rank):
        asked.append(rank)
        return read(self, rank)

    monkeypatch.setattr(BeatFolder, "read", counted)
    watched.pass_time(0.5, beating=(1, 2))
    assert asked == [0, 1, 2]


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


def test_a_silent_rank_is_not_lost_as_long_as_the_others_go_on(watched):
    assert watched.pass_time(0.0, beating=(1, 2)) is None
    for _ in range(4):
        assert watched.pass_time(1.2, beating=(2,), go_on=True) is None, "its storage is slow, no more"
    assert watched.pass_time(0.5, beating=(2,)) is None
    verdict = watched.pass_time(0.7, beating=(2,))
    assert verdict.culprits == [1], "now they wait for it"


def test_a_silent_host_is_not_lost_as_long_as_the_first_rank_goes_on(watched):
    assert watched.pass_time(0.0, beating=(1, 2)) is None
    assert watched.pass_time(1.2, beating=(), go_on=True) is None
    assert watched.pass_time(1.2, beating=()).culprits == [1, 2]


def test_ranks_that_are_done_do_not_stand_still(watched):
    assert watched.pass_time(0.0, beating=(1, 2)) is None
    watched.leave(2)
    assert watched.pass_time(1.2, beating=()).culprits == [1]
