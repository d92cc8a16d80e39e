"""The ranks of a job meet at the master's port before any collective: those that do not come are named, and what one of
them has met that ends the job ends it for all of them at once, with one message and one exit status.

Process groups would wait for a missing rank as long as for any collective, and name nobody. A launcher that has to kill
ranks that wait tells of the signal, not of the error that can be mended.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megagpt.errors import TRY_AGAIN, MegagptError, MissingRanksError, RankError
from megagpt.launchers import host_name
from megagpt.parallel.launch import Launch

MEETING_SECONDS = 600.0
"""From the first rank's coming to the last one's: enough to load libraries and to fetch an index on a busy host."""
SECONDS_FOR_LATE_ONES = 60.0
"""How long ranks that are about to leave stay for those that have not come yet, which must learn of it."""
_SECONDS_TO_HEAR = 2.0
_ALL_IS_WELL = "all is well"


@dataclass(frozen=True)
class _Problem:
    """What ends the job: the first one counts."""

    rank: int
    """Who says it."""
    text: str
    exit_code: int
    is_absence: bool = False
    """Others have not come, or cannot take part: nobody waits for them any more."""


def torchrun_serves() -> bool:
    """Whether torchrun's agent serves the master's port, where a rank would open it otherwise."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(launch: Launch, problem: MegagptError | None = None, seconds: float = MEETING_SECONDS) -> dist.TCPStore | None:
    """Wait for all ranks, and for what they say.

    Args:
        launch: this process's rank, and where to meet.
        problem: what this rank has met, for which the job must end.
        seconds: how long at most.

    Returns:
        What keeps the port open, on the first rank, until the process groups are there; None for a rank alone.

    Raises:
        torch.distributed.DistError: the port is taken, or cannot be reached.
        MissingRanksError: on the first rank: some have not come.
        MegagptError: the problem.
        RankError: another rank tells why the job ends.
    """
    if launch.world_size == 1:
        if problem is not None:
            raise problem
        return None
    meeting = _Meeting(launch, seconds)
    meeting.come(problem)
    if launch.rank == 0:
        meeting.judge()
    outcome = meeting.outcome()
    if outcome is None:
        return meeting.store
    meeting.part(outcome)
    if outcome.rank != launch.rank:
        raise RankError("", outcome.exit_code)
    if problem is not None and str(problem) == outcome.text:
        raise problem
    if outcome.is_absence:
        raise MissingRanksError(outcome.text, meeting.present)
    raise RankError(outcome.text, outcome.exit_code)


class _Meeting:
    """One rank's side of it.

    Args:
        launch: this process's rank, and where to meet.
        seconds: how long to wait at most.
    """

    def __init__(self, launch: Launch, seconds: float):
        self._launch, self._seconds = launch, seconds
        # torchrun's agents still serve the port when they start the ranks again.
        self._is_served = torchrun_serves()
        self._prefix = f"megagpt/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store = dist.TCPStore(
            launch.master_addr,
            launch.master_port,
            launch.world_size,
            is_master=launch.rank == 0 and not self._is_served,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,  # the process groups open it again
        )
        self.present: list[str] = []
        """Hosts of the ranks that have come and can take part, once that is asked for."""

    def _key(self, name: str | int) -> str:
        return f"{self._prefix}/{name}"

    def come(self, problem: MegagptError | None) -> None:
        """Tell the others of this rank."""
        self.store.set(self._key(self._launch.rank), json.dumps([host_name(), torch.cuda.is_available()]))
        if problem is not None:
            self._end(str(problem), problem.exit_code)
        if self.store.add(self._key("count"), 1) == self._launch.world_size:
            self.store.set(self._key("complete"), "")

    def judge(self) -> None:
        """On the first rank: say that all is well, or what is not."""
        has_come = self._all_come()
        if self.store.check([self._key("outcome")]):
            return
        told = list(self._told())
        self.present = list(dict.fromkeys(host for host, _ in told))
        if not has_come:
            self._end(self._missing(), TRY_AGAIN, is_absence=True)
            return
        by_kind = {has_gpu: host for host, has_gpu in reversed(told)}
        if len(by_kind) > 1:
            self.present = list(dict.fromkeys(host for host, has_gpu in told if has_gpu))
            self._end(
                f"the ranks of {by_kind[False]} see no GPU, but those of {by_kind[True]} do; see that the driver of "
                f"{by_kind[False]} works and fits torch (nvidia-smi, tools/doctor.py), or hide the GPUs from all ranks "
                "(CUDA_VISIBLE_DEVICES=)",
                TRY_AGAIN,
                is_absence=True,
            )
            return
        self.store.compare_set(self._key("outcome"), "", _ALL_IS_WELL)

    def outcome(self) -> _Problem | None:
        """What ends the job; None: nothing."""
        self.store.wait([self._key("outcome")], timedelta(seconds=2 * self._seconds))
        text = self.store.get(self._key("outcome")).decode()
        return None if text == _ALL_IS_WELL else _Problem(*json.loads(text))

    def part(self, outcome: _Problem) -> None:
        """Stay until those that are still to come have heard it too."""
        if not outcome.is_absence:
            with contextlib.suppress(dist.DistError):
                self.store.wait([self._key("complete")], timedelta(seconds=SECONDS_FOR_LATE_ONES))
        if self._launch.rank == 0 and not self._is_served:
            time.sleep(_SECONDS_TO_HEAR)  # the store goes with this process

    def _end(self, text: str, exit_code: int, is_absence: bool = False) -> None:
        said = json.dumps([self._launch.rank, text, exit_code, is_absence])
        self.store.compare_set(self._key("outcome"), "", said)

    def _all_come(self) -> bool:
        """Whether all ranks come in time, and before something is said that ends the job."""
        deadline = time.monotonic() + self._seconds
        while not self.store.check([self._key("complete")]):
            if time.monotonic() > deadline or self.store.check([self._key("outcome")]):
                return False
            time.sleep(0.05)
        return True

    def _told(self) -> Iterator[tuple[str, bool]]:
        """Host of each rank that has come, and whether it sees a GPU."""
        for rank in range(self._launch.world_size):
            if self.store.check([self._key(rank)]):
                host, has_gpu = json.loads(self.store.get(self._key(rank)))
                yield host, has_gpu

    def _missing(self) -> str:
        launch, present = self._launch, ", ".join(self.present)
        missing = [rank for rank in range(launch.world_size) if not self.store.check([self._key(rank)])]
        return (
            f"{len(missing)} of {launch.world_size} ranks have not come to MASTER_ADDR={launch.master_addr} "
            f"MASTER_PORT={launch.master_port} within {self._seconds:.0f} s: {_spans(missing)}; the others are on "
            f"{present}: see that the missing ones were started, what they have printed, and that their hosts reach "
            "this port"
        )


def _spans(ranks: list[int]) -> str:
    """`0, 4 ... 7` of 0, 4, 5, 6, 7."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    return ", ".join(" ... ".join(map(str, span)) for span in spans)
