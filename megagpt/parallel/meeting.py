"""The ranks of a job meet at the master's port, and those that do not come are named.

Process groups would wait for a missing rank as long as for any collective, and name nobody.
"""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from megagpt.errors import TRY_AGAIN, LaunchError, RankError
from megagpt.launchers import host_name
from megagpt.parallel.launch import Launch

MEETING_SECONDS = 600.0
"""From the first rank's coming to the last one's: enough to load libraries and to fetch an index on a busy host."""
_PREFIX = "megagpt/meeting"
_OUTCOME, _ALL, _MISSING = f"{_PREFIX}/outcome", "all have come", "some are missing"
_SECONDS_TO_HEAR = 2.0


def meet(launch: Launch, seconds: float = MEETING_SECONDS) -> dist.TCPStore | None:
    """Wait for all ranks.

    Args:
        launch: this process's rank, and where to meet.
        seconds: how long at most.

    Returns:
        What keeps the port open, on the first rank, until the process groups are there; None where torchrun has seen to
        it that all have come.

    Raises:
        torch.distributed.DistError: the port is taken, or cannot be reached.
        LaunchError: on the first rank: some have not come.
        RankError: on others: the first rank tells.
    """
    if launch.world_size == 1 or torchrun_serves():
        return None
    store = dist.TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=launch.rank == 0,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,  # the process groups open it again
    )
    store.set(f"{_PREFIX}/{launch.rank}", host_name())
    if store.add(f"{_PREFIX}/come", 1) == launch.world_size:
        store.set(_OUTCOME, _ALL)
    try:
        store.wait([_OUTCOME], timedelta(seconds=seconds if launch.rank == 0 else 2 * seconds))
    except dist.DistStoreError:
        if launch.rank != 0:
            raise
        text = _missing(store, launch, seconds)
        store.set(_OUTCOME, _MISSING)
        time.sleep(_SECONDS_TO_HEAR)  # the store goes with this process
        raise LaunchError(text, TRY_AGAIN) from None
    if store.get(_OUTCOME).decode() == _MISSING:
        raise RankError("", TRY_AGAIN)
    return store


def torchrun_serves() -> bool:
    """Whether torchrun itself has a store at the port where ranks meet, so that no rank can open one there."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _missing(store: dist.TCPStore, launch: Launch, seconds: float) -> str:
    present = [rank for rank in range(launch.world_size) if store.check([f"{_PREFIX}/{rank}"])]
    missing = sorted(set(range(launch.world_size)) - set(present))
    hosts = dict.fromkeys(store.get(f"{_PREFIX}/{rank}").decode() for rank in present)
    return (
        f"{len(missing)} of {launch.world_size} ranks have not come to MASTER_ADDR={launch.master_addr} "
        f"MASTER_PORT={launch.master_port} within {seconds:.0f} s: {_spans(missing)}; the others are on "
        f"{', '.join(hosts)}: see that the missing ones were started, what they have printed, and that their hosts "
        "reach this port"
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
