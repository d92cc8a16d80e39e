"""Where the hosts of a job tell each other what they found, before anything of the run's own network is tried."""

import json
import time
from collections import Counter
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megagpt.errors import LaunchError
from megagpt.parallel.launch import Launch
from megagpt.parallel.meeting import torchrun_serves

_UNREACHABLE = (dist.DistError, RuntimeError)
_PREFIX = "megagpt/doctor"
_MARGIN = 30.0
"""How much longer ranks wait for what rank 0 makes known than rank 0 waits for them."""


class Meeting:
    """All ranks around one key-value store on rank 0's host, which torchrun serves or else rank 0; values are JSON.

    Rank 0 alone collects what ranks say and makes it known to all as one value: N ranks take some 3N requests.

    Args:
        launch: this process's place.
        seconds: to wait for the ranks, all together.

    Raises:
        LaunchError: the store cannot be reached, or some ranks have not come in time.
    """

    def __init__(self, launch: Launch, seconds: float):
        self.launch = launch
        self.where = f"{launch.master_addr}:{launch.master_port}"
        self.lost: dict[int, str] = {}
        """Ranks that have not answered in time, and what they were at; alike on all ranks."""
        self._gathered: Counter[str] = Counter()
        started = time.monotonic()
        try:
            store = dist.TCPStore(
                launch.master_addr,
                launch.master_port,
                None,
                is_master=launch.rank == 0 and not torchrun_serves(),
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
            self.prefix = _own_prefix(store, launch.rank)
            """Of all names in the store."""
            self.store = dist.PrefixStore(self.prefix, store)
            self.store.set(f"here/{launch.rank}", "")
            left = max(seconds - (time.monotonic() - started), 1.0)
            self.store.wait(["here/0"], timedelta(seconds=left))  # torchrun's store is there before rank 0 is
        except _UNREACHABLE as error:
            raise LaunchError(
                f"rank {launch.rank} cannot reach {self.where} ({_reason(error)}); check that this is rank 0's host, "
                "that no firewall closes the port (MASTER_PORT chooses another), and that rank 0 was started"
            ) from None
        patience = left if launch.rank == 0 else seconds
        missing = self._make_known("missing", patience, lambda: self._absent("here", range(launch.world_size), left))
        if missing:
            self.lost = dict.fromkeys(missing, "start")
            self.part()
            raise AbsentRanksError(
                f"of {launch.world_size} ranks {len(missing)} have not come to {self.where} within {seconds:.0f} s: "
                f"{', '.join(map(str, missing[:8]))}; see what their hosts print"
            )

    def note(self, doing: str) -> None:
        """Write down what this rank is at, for the case that it does not come back from it.

        Raises:
            LaunchError: rank 0 does not answer.
        """
        self._lay(f"doing/{self.launch.rank}", doing)

    def gather(self, what: str, value: Any, seconds: float, among: Collection[int] | None = None) -> dict[int, Any]:
        """The values of some ranks by rank, without those that have been lost; all of them call this.

        Args:
            what: they are about to tell.
            value: of this rank.
            seconds: that all of them have for it, from now on.
            among: the ranks, of which rank 0 is one; None: all.

        Raises:
            LaunchError: rank 0 does not answer, which may have left without this rank.
        """
        self._gathered[what] += 1
        name = f"{what}/{self._gathered[what]}"
        ranks = [rank for rank in (range(self.launch.world_size) if among is None else among) if rank not in self.lost]
        self._lay(f"{name}/{self.launch.rank}", json.dumps(value))
        said, lost = self._make_known(name, seconds, lambda: self._collect(name, ranks, seconds))
        self.lost |= {int(rank): doing for rank, doing in lost.items()}
        return {int(rank): value for rank, value in said.items()}

    def tell(self, what: str, value: Any) -> None:
        """Make a value of rank 0's known."""
        self._lay(f"{what}/all", json.dumps(value))

    def hear(self, what: str, seconds: float) -> Any:
        """What rank 0 has made known; waits for it.

        Raises:
            LaunchError: rank 0 does not answer, which may have left without this rank.
        """
        try:
            self.store.wait([f"{what}/all"], timedelta(seconds=seconds))
            return json.loads(self.store.get(f"{what}/all"))
        except _UNREACHABLE as error:
            raise self._silence(error) from None

    def part(self) -> None:
        """Leave; rank 0, whose host has the store, is the last."""
        try:
            self.store.set(f"left/{self.launch.rank}", "")
        except _UNREACHABLE:
            return
        if self.launch.rank == 0:
            self._absent("left", [rank for rank in range(self.launch.world_size) if rank not in self.lost], 10.0)

    def _lay(self, key: str, text: str) -> None:
        try:
            self.store.set(key, text)
        except _UNREACHABLE as error:
            raise self._silence(error) from None

    def _silence(self, error: Exception) -> LaunchError:
        return LaunchError(
            f"rank {self.launch.rank} hears nothing more of rank 0 at {self.where} ({_reason(error)}); see what "
            "rank 0's host prints"
        )

    def _make_known(self, what: str, seconds: float, find: Any) -> Any:
        """What rank 0 finds out, on all ranks."""
        if self.launch.rank == 0:
            found = find()
            self.tell(what, found)
            return found
        return self.hear(what, seconds + _MARGIN)

    def _collect(self, name: str, ranks: list[int], seconds: float) -> tuple[dict[int, Any], dict[int, str]]:
        """On rank 0: what the ranks say, and those that say nothing with what they are at."""
        absent = self._absent(name, ranks, seconds)
        there = [rank for rank in ranks if rank not in absent]
        values = self.store.multi_get([f"{name}/{rank}" for rank in there])
        said = {rank: json.loads(value) for rank, value in zip(there, values, strict=True)}
        return said, {rank: self._doing(rank) for rank in absent}

    def _absent(self, name: str, ranks: Collection[int], seconds: float) -> list[int]:
        """The ranks that have not laid a value on the table within so many seconds, all together."""
        try:
            self.store.wait([f"{name}/{rank}" for rank in ranks], timedelta(seconds=seconds))
        except _UNREACHABLE:
            return [rank for rank in ranks if not self.store.check([f"{name}/{rank}"])]
        return []

    def _doing(self, rank: int) -> str:
        name = f"doing/{rank}"
        return self.store.get(name).decode() if self.store.check([name]) else "start"


class AbsentRanksError(LaunchError):
    """Some ranks have not come; all that have come know it."""


def _own_prefix(store: dist.TCPStore, rank: int) -> str:
    """Of names that nothing else has in this store: torchrun's outlives the ranks, and serves several uses in turn."""
    use = store.add(f"{_PREFIX}/uses/{rank}", 1)
    return f"{_PREFIX}/{use}"


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
