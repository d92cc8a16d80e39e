"""One cluster of two nodes for all tests of a session, and drills on other clusters beside them.

Where there can be no cluster the tests are skipped, with the reason.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from bed import Cluster, obstacle, running_cluster


@pytest.fixture(scope="session")
def cluster(background: "dict[str, Future[None]]") -> Iterator[Cluster]:
    """Two nodes and a head."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def background() -> "Iterator[dict[str, Future[None]]]":
    """Drills that go on while other tests do, one after the other: most of their time goes into waiting for Slurm."""
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    from test_waiting_faults import DRILLS

    with ThreadPoolExecutor(1) as pool:
        drills = {name: pool.submit(drill) for name, drill in DRILLS.items()}
        yield drills
        pool.shutdown(cancel_futures=True)
