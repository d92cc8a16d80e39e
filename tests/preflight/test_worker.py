"""Questions to a process that may hang or die."""

import os
import time
from pathlib import Path

import pytest

from megagpt.preflight.worker import NoAnswerError, Worker


def answer(what: str) -> int:
    if what == "hang":
        time.sleep(1000)
    if what == "die":
        os._exit(3)
    return os.getpid()


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("what", "words"), [("hang", "has not ended within 0 s"), ("die", "has ended its process")])
def test_a_new_process_takes_the_place_of_one_that_does_not_answer(what: str, words: str) -> None:
    with Worker(answer) as worker:
        first = worker.ask(60, "who")
        assert worker.ask(60, "who") == first
        with pytest.raises(NoAnswerError, match=words):
            worker.ask(0.2 if what == "hang" else 60, what)
        assert worker.ask(60, "who") not in (first, os.getpid())


def test_nothing_is_left_of_a_process_that_hangs() -> None:
    with Worker(answer) as worker:
        pid = worker.ask(60, "who")
        with pytest.raises(NoAnswerError):
            worker.ask(0.2, "hang")
    ends_at = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert not is_running(pid)
