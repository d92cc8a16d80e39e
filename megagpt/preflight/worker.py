"""What may hang is done by a process of its own, which is given up when its time is over.

It is forked from one that has neither looked at a GPU nor joined a group of ranks: CUDA, NCCL and gloo do not survive a
fork, and a process that has such a one behind it, or a file system that is gone, may never end.
"""

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

_PR_SET_PDEATHSIG = 1


class NoAnswerError(Exception):
    """A question was not answered in time, or the process has died of it; the message says which."""


class Worker:
    """Answers questions in a forked process; a new one takes its place after a question that it could not answer.

    Args:
        answer: what it does with a question; raises nothing. Each process keeps what the function keeps.
    """

    def __init__(self, answer: Callable[..., Any]):
        self._answer = answer
        self._pid: int | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def ask(self, seconds: float, *question: Any) -> Any:
        """The answer to a question.

        Raises:
            NoAnswerError: there is none within so many seconds.
        """
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(question)
            if self._pipe.poll(seconds):
                return self._pipe.recv()
            reason = f"has not ended within {seconds:.0f} s"
        except (EOFError, OSError):
            reason = "has ended its process"
        self.give_up()
        raise NoAnswerError(reason)

    def give_up(self) -> None:
        """End the process; does not wait for one that a dead file system holds."""
        if self._pipe is not None and self._pid is not None:
            self._pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, os.WNOHANG)
        self._pid = self._pipe = None

    def _start(self) -> None:
        ours, theirs = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _serve(self._answer, theirs, parent)
        theirs.close()
        self._pipe = ours


def _serve(answer: Callable[..., Any], pipe: Connection, parent: int) -> None:
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        while os.getppid() == parent:
            pipe.send(answer(*pipe.recv()))
    except EOFError:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
