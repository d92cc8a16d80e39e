"""Tests on real gloo ranks."""

import functools
from collections.abc import Callable
from typing import Any

from megagpt.parallel.local_ranks import RankFailedError, run_ranks

__all__ = ["RankFailedError", "in_own_process", "run_ranks"]


def in_own_process(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a forked process; its fixtures are made in the parent.

    For what joins process groups: gloo's threads do not survive a fork, so that ranks forked later would hang.
    """

    @functools.wraps(test)
    def forked(*args: Any, **kwargs: Any) -> None:
        run_ranks(test, 1, *args, **kwargs)

    return forked
