"""One cluster of two nodes for all tests of a session. Where it cannot be had they are skipped, with the reason."""

from collections.abc import Iterator

import pytest
from bed import Cluster, obstacle, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes and a head."""
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster
