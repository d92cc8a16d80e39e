"""Run a function on real gloo ranks of this host: the caller has imported the libraries, each call forks its ranks.

No torch here: what the function needs is imported by the caller before, once for all ranks, or by the function itself.
The caller must not have joined process groups: gloo's threads do not survive a fork, so that ranks would hang.
"""

import ctypes
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from megagpt.parallel.launch import free_port

_PR_SET_PDEATHSIG = 1


class RankFailedError(RuntimeError):
    """A rank raised, died or did not end in time; the message holds the ranks' tracebacks and last output."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, **kwargs: Any) -> list:
    """Call `function(*args, **kwargs)` in `world_size` processes and return their results in rank order.

    Each process finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as under torchrun. What the ranks
    print is shown only if one fails.

    Raises:
        RankFailedError: a rank raised, died or took longer than `timeout` seconds.
    """
    port = free_port()
    children: dict[int, tuple[int, int]] = {}  # read end of the pipe -> rank, pid
    for rank in range(world_size):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _run_child(function, args, kwargs, rank, world_size, port, write_end)
        os.close(write_end)
        children[read_end] = (rank, pid)
    outputs = _collect(children, time.monotonic() + timeout)
    results = [pickle.loads(data) if data else (False, "killed or timed out") for data in outputs]
    failures = [f"rank {rank}: {value}" for rank, (ok, value) in enumerate(results) if not ok]
    if failures:
        raise RankFailedError("\n".join(failures))
    return [value for _, value in results]


def _run_child(
    function: Callable, args: tuple, kwargs: dict, rank: int, world_size: int, port: int, write_end: int
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed test run leaves no ranks behind
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with tempfile.TemporaryFile() as output:  # has no name, so a killed rank leaves nothing behind
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        try:
            result = (True, function(*args, **kwargs))
        except BaseException:
            sys.stdout.flush()
            said = os.pread(output.fileno(), 1 << 20, 0).decode(errors="replace")
            result = (False, f"{traceback.format_exc()}\n--- output ---\n{said[-2000:]}")
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(pickle.dumps(result))
    os._exit(0)


def _collect(children: dict[int, tuple[int, int]], deadline: float) -> list[bytes]:
    """Read all pipes to the end; once one rank has failed the others get two seconds."""
    outputs = [b""] * len(children)
    pending = dict(children)
    selector = selectors.DefaultSelector()
    for end in pending:
        selector.register(end, selectors.EVENT_READ)
    while pending and time.monotonic() < deadline:
        for key, _ in selector.select(timeout=0.5):
            end = int(key.fd)
            rank, _pid = pending[end]
            chunk = os.read(end, 1 << 20)
            outputs[rank] += chunk
            if not chunk:
                selector.unregister(end)
                del pending[end]
                if not outputs[rank] or not pickle.loads(outputs[rank])[0]:
                    deadline = min(deadline, time.monotonic() + 2.0)
    for end, (_, pid) in children.items():
        if end in pending:
            os.kill(pid, signal.SIGKILL)
        os.close(end)
        os.waitpid(pid, 0)
    return outputs
