"""Splits never share a document; samples are the right windows in the right order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.samples import SPLITS, SampleStream, split_ranges
from megagpt.errors import ConfigError, DataError


class CountingTokens:
    """Token number i is i."""

    prefix = "counting"

    def tokens(self, start, stop):
        return np.arange(start, stop, dtype=np.uint16)


def ranges_of(offsets, split):
    return split_ranges(len(offsets) - 1, offsets.tolist().__getitem__, split)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=3, max_size=200),
    split=st.tuples(st.floats(50, 100), st.floats(0, 50), st.floats(0, 50)),
)
def test_splits_cover_whole_documents_once(lengths, split):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ranges = ranges_of(offsets, split)
    assert tuple(ranges) == SPLITS
    assert ranges["train"][0] == 0
    assert ranges["train"][1] == ranges["validation"][0]
    assert ranges["validation"][1] == ranges["test"][0]
    assert ranges["test"][1] == offsets[-1]
    assert {bound for pair in ranges.values() for bound in pair} <= set(offsets.tolist())


def test_split_follows_the_shares():
    offsets = np.arange(0, 1001 * 3, 3)
    assert ranges_of(offsets, (90, 5, 5)) == {
        "train": (0, 2700),
        "validation": (2700, 2850),
        "test": (2850, 3000),
    }
    assert ranges_of(offsets, (1, 0, 0))["train"] == (0, 3000)
    assert ranges_of(offsets, (8, 1, 1))["train"] == (0, 2400)


@pytest.mark.parametrize("split", [(0, 50, 50), (0.001, 100, 0)])
def test_empty_train_split(split):
    with pytest.raises(DataError, match="leaves no text of 10 documents for training; raise the first share"):
        ranges_of(np.arange(11), split)


@pytest.mark.parametrize("split", [(-1, 50, 51), (0, 0, 0), (float("nan"), 1, 1), (float("inf"), 1, 1), (1, 1)])
def test_shares_that_are_none(split):
    with pytest.raises(ConfigError, match=r"data\.split=.* must be three shares"):
        ranges_of(np.arange(11), split)


def test_windows_overlap_by_one_token():
    stream = SampleStream(CountingTokens(), (10, 31), 4, seed=0, shuffle=False)
    assert len(stream) == 5
    assert stream.sample(0).tolist() == [10, 11, 12, 13, 14]
    assert stream.sample(1).tolist() == [14, 15, 16, 17, 18]
    assert stream.sample(4).tolist() == [26, 27, 28, 29, 30]
    assert stream.sample(5).tolist() == stream.sample(0).tolist()
    assert stream.sample(0).dtype == np.int64


@pytest.mark.parametrize(("num_tokens", "num_samples"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_number_of_samples(num_tokens, num_samples):
    assert len(SampleStream(CountingTokens(), (3, 3 + num_tokens), 4, seed=0)) == num_samples


def test_each_epoch_visits_each_window_once_in_its_own_order():
    stream = SampleStream(CountingTokens(), (0, 4001), 4, seed=3)
    epochs = [[int(stream.sample(epoch * 1000 + i)[0]) for i in range(1000)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 4000, 4))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    other = SampleStream(CountingTokens(), (0, 4001), 4, seed=4)
    assert [int(other.sample(i)[0]) for i in range(1000)] != epochs[0]


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_too_short_for_one_sample(num_tokens):
    with pytest.raises(DataError, match=f"counting has {num_tokens} tokens here, training.seq_length=4 needs 5"):
        SampleStream(CountingTokens(), (0, num_tokens), 4, seed=0)


def test_tokens_outside_the_vocabulary():
    stream = SampleStream(CountingTokens(), (0, 21), 4, seed=0, shuffle=False, vocab_size=11)
    assert stream.sample(1).tolist() == [4, 5, 6, 7, 8]
    with pytest.raises(DataError, match=r"counting: token number 11 is 11, outside model\.vocab_size=11"):
        stream.sample(2)


@given(
    num_tokens=st.integers(2, 400), seq_length=st.integers(1, 60), seed=st.integers(0, 2**64), epoch=st.integers(0, 5)
)
def test_an_epoch_predicts_every_token_once_up_to_the_last_partial_sample(num_tokens, seq_length, seed, epoch):
    if num_tokens <= seq_length:
        return
    stream = SampleStream(CountingTokens(), (3, 3 + num_tokens), seq_length, seed)
    labels = np.concatenate([stream.sample(epoch * len(stream) + i)[1:] for i in range(len(stream))])
    assert sorted(labels.tolist()) == list(range(4, 4 + len(stream) * seq_length))
    assert num_tokens - 1 - len(labels) < seq_length, "what is left is less than a sample"
