"""Where the hosts of a job tell each other what they found, before anything of the run's own network is tried."""

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megagpt.errors import LaunchError
from megagpt.parallel.launch import Launch


class Meeting:
    """All ranks around one key-value store on rank 0's host; values are JSON.

    Args:
        launch: this process's place.
        seconds: to wait for a rank.

    Raises:
        LaunchError: the store cannot be reached, or (on rank 0) some ranks have not come.
    """

    def __init__(self, launch: Launch, seconds: float = 60.0):
        self.launch, self.seconds = launch, seconds
        where = f"{launch.master_addr}:{launch.master_port}"
        try:
            self._store = dist.TCPStore(
                launch.master_addr,
                launch.master_port,
                None,
                is_master=launch.rank == 0,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
            self.tell("here", launch.rank)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise LaunchError(
                f"rank {launch.rank} cannot reach {where} ({reason}); check that this is rank 0's host, that no "
                "firewall closes the port (MASTER_PORT chooses another), and that rank 0 was started"
            ) from None
        missing = [rank for rank in range(launch.world_size) if not self._has_come(rank)]
        if missing:
            raise LaunchError(
                f"of {launch.world_size} ranks {len(missing)} have not come to {where} within {seconds:.0f} s: "
                f"{', '.join(map(str, missing[:8]))}; see what their hosts print"
            )

    def _has_come(self, rank: int) -> bool:
        try:
            self._store.wait([f"here/{rank}"], timedelta(seconds=self.seconds))
        except (dist.DistStoreError, RuntimeError):
            return False
        return True

    def tell(self, what: str, value: Any, rank: int | None = None) -> None:
        """Lay a value on the table, for this rank."""
        self._store.set(f"{what}/{self.launch.rank if rank is None else rank}", json.dumps(value))

    def hear(self, what: str, rank: int) -> Any:
        """What a rank has laid on the table; waits for it."""
        self._store.wait([f"{what}/{rank}"], timedelta(seconds=10 * self.seconds))  # others may be measuring
        return json.loads(self._store.get(f"{what}/{rank}"))

    def gather(self, what: str, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        self.tell(what, value)
        return [self.hear(what, rank) for rank in range(self.launch.world_size)]

    def part(self) -> None:
        """Leave; rank 0, whose host has the table, is the last."""
        self.tell("left", True)
        if self.launch.rank == 0:
            for rank in range(self.launch.world_size):
                self.hear("left", rank)
