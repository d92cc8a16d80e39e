"""Run a function on real ranks of this host: forks of the caller, which has imported the libraries, or new processes.

No torch here: what the function needs is imported by the caller before, once for all ranks, or by the function itself.
A caller whose ranks are forked must not have joined process groups, as gloo's threads do not survive a fork, so that
ranks would hang; nor must it have looked for GPUs, which a fork cannot use.
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from megagpt.parallel.launch import free_port

_PR_SET_PDEATHSIG = 1


class RankFailedError(RuntimeError):
    """A rank raised, died or did not end in time; the message holds the ranks' tracebacks and last output."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    environments: Sequence[Mapping[str, str]] | None = None,
    **kwargs: Any,
) -> list:
    """Call `function(*args, **kwargs)` in `world_size` processes and return their results in rank order.

    Each process finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as under torchrun. What the ranks
    print is shown only if one fails.

    Args:
        function: of a module, if the ranks are new processes.
        world_size: how many ranks.
        *args: of the function.
        timeout: seconds for all of it.
        environments: what each rank finds in its environment besides; the ranks are then new processes, which import
            everything themselves. None: forks of this one.
        **kwargs: of the function.

    Raises:
        RankFailedError: a rank raised, died or took longer than `timeout` seconds.
    """
    call = function, args, kwargs
    new = None if environments is None else pickle.dumps(call)
    port = free_port()
    children: dict[int, tuple[int, int]] = {}  # read end of the pipe -> rank, pid
    for rank in range(world_size):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _prepare_child(rank, world_size, port)
            if environments is not None and new is not None:
                _begin_anew(new, environments[rank], write_end)
            _answer(lambda: call, write_end)
        os.close(write_end)
        children[read_end] = (rank, pid)
    outputs = _collect(children, time.monotonic() + timeout)
    results = [pickle.loads(data) if data else (False, "killed or timed out") for data in outputs]
    failures = [f"rank {rank}: {value}" for rank, (ok, value) in enumerate(results) if not ok]
    if failures:
        raise RankFailedError("\n".join(failures))
    return [value for _, value in results]


def _prepare_child(rank: int, world_size: int, port: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed test run leaves no ranks behind
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _begin_anew(call: bytes, environment: Mapping[str, str], write_end: int) -> NoReturn:
    """Make of this process a new interpreter that makes the call."""
    memory = os.memfd_create("call")
    os.write(memory, call)
    os.set_inheritable(memory, True)
    os.set_inheritable(write_end, True)
    command = [sys.executable, "-m", __name__, str(memory), str(write_end)]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    os.execve(sys.executable, command, {**os.environ, **path, **environment})


def _answer(call: Callable[[], tuple[Callable[..., Any], tuple, dict[str, Any]]], write_end: int) -> NoReturn:
    """Make the call and write its result, or the traceback and what was printed."""
    with tempfile.TemporaryFile() as output:  # has no name, so a killed rank leaves nothing behind
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        try:
            function, args, kwargs = call()
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


def _answer_as_new_process() -> NoReturn:
    memory, write_end = map(int, sys.argv[1:])
    data = os.pread(memory, os.fstat(memory).st_size, 0)
    _answer(lambda: pickle.loads(data), write_end)  # written by the process that started this one


if __name__ == "__main__":
    _answer_as_new_process()
