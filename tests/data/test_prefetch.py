"""Reading ahead changes nothing but when things are read."""

import threading
import time
from itertools import count, islice

import pytest
import torch

from megagpt.data.prefetch import Prefetched
from megagpt.errors import DataError


def batches(read=None, fails_at=None, stops_at=None):
    for i in count():
        if i == stops_at:
            return
        if i == fails_at:
            raise DataError(f"micro-batch {i}")
        if read is not None:
            read.append(i)
        yield torch.tensor([[i]]), torch.tensor([[i + 1]])


def numbers(found):
    return [int(tokens_BS) for tokens_BS, _ in found]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_same_micro_batches_in_the_same_order(ahead):
    with Prefetched(batches(stops_at=50), ahead) as found:
        assert numbers(found) == list(range(50))
        assert next(found, None) is None, "and no more behind the end"
    assert threads() == []


def test_as_many_are_read_ahead_as_asked_for():
    read = []
    with Prefetched(batches(read), 3) as found:
        assert numbers(islice(found, 2)) == [0, 1]
        deadline = time.monotonic() + 20
        while len(read) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert read == [0, 1, 2, 3, 4, 5], "two taken, three waiting, one in the thread's hand"
    assert threads() == []


@pytest.mark.parametrize("ahead", [0, 4])
def test_an_error_comes_where_its_micro_batch_would_have_come(ahead):
    with Prefetched(batches(fails_at=3), ahead) as found:
        assert numbers(islice(found, 3)) == [0, 1, 2]
        with pytest.raises(DataError, match="micro-batch 3"):
            next(found)
        assert next(found, None) is None
    assert threads() == []


def test_nothing_is_left_when_it_is_closed_early():
    found = Prefetched(batches(), 2)
    next(found)
    found.close()
    assert threads() == []
