"""Samples of one document each: every token of an epoch once, whatever the sizes, and nothing but the document."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data import document_samples
from megagpt.data.document_samples import DocumentStream
from megagpt.data.indexed import IndexedDataset, IndexedWriter
from megagpt.data.marking import PADDING, Marking, Spans
from megagpt.errors import DataError


class Numbered:
    """Documents of given lengths; token number i is i."""

    prefix = "numbered"

    def __init__(self, lengths):
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def tokens(self, start, stop):
        return np.arange(start, stop)

    def document_start(self, index):
        return int(self.offsets[index])

    def document_lengths(self, first, behind):
        return np.diff(self.offsets[first : behind + 1])


LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=80)


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    seq_length=st.integers(1, 40),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 3),
    skipped=st.integers(0, 5),
    group=st.sampled_from([1, 3, 1024]),
)
def test_an_epoch_predicts_every_token_of_every_document_once(lengths, seq_length, seed, epoch, skipped, group):
    source = Numbered(lengths)
    skipped = min(skipped, len(lengths) - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_samples, "_GROUP", group)
        patch.setattr(document_samples, "_SCANNED", 2 * group)
        if max(lengths[skipped:]) < 2:
            with pytest.raises(DataError, match="numbered has no document of at least two tokens here"):
                DocumentStream(source, (skipped, len(lengths)), seq_length, seed)
            return
        stream = DocumentStream(source, (skipped, len(lengths)), seq_length, seed)
        samples = [stream.marked(epoch * len(stream) + i) for i in range(len(stream))]
        places = [stream.place(epoch * len(stream) + i) for i in range(len(stream))]
    predicted = np.concatenate([sample.tokens[1:][sample.learnt[1:]] for sample in samples])
    behind_first = [np.arange(a + 1, b) for a, b in pairwise(source.offsets[skipped:])]
    assert sorted(predicted.tolist()) == np.concatenate(behind_first).tolist()
    for sample, (document, start, stop) in zip(samples, places, strict=True):
        real = sample.places != PADDING
        assert real.sum() == stop - start >= 2
        assert sample.tokens[real].tolist() == list(range(start, stop))
        assert source.offsets[document] <= start < stop <= source.offsets[document + 1]
        assert sample.places[real].tolist() == list(range(stop - start))
        assert not sample.learnt[~real].any()
        assert len(sample.tokens) == len(sample.places) == len(sample.learnt) == seq_length + 1


@settings(deadline=None)
@given(lengths=LENGTHS, seq_length=st.integers(1, 40), seed=st.integers(0, 2**64))
def test_truncated_documents_give_one_sample_each(lengths, seq_length, seed):
    source = Numbered(lengths)
    stream = DocumentStream(source, (0, len(lengths)), seq_length, seed, cut=False)
    assert len(stream) == len(lengths)
    found = []
    for i in range(len(stream)):
        document, *_ = stream.place(i)
        sample = stream.marked(i)
        found.append(document)
        length = min(lengths[document], seq_length + 1)
        first = source.offsets[document]
        assert sample.tokens[:length].tolist() == list(range(first, first + length))
        assert sample.learnt[1:].sum() == max(length - 1, 0)
        assert sample.places[0] == 0, "the first token is never padding: a sample without any would have no end"
        assert (sample.places[1:] == PADDING).sum() == seq_length + 1 - max(length, 1)
    assert sorted(found) == list(range(len(lengths)))


def test_epochs_and_seeds_have_orders_of_their_own():
    source = Numbered([7] * 50)
    stream = DocumentStream(source, (0, 50), 4, seed=1)
    epochs = [[int(stream.sample(epoch * len(stream) + i)[0]) for i in range(len(stream))] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    other = DocumentStream(source, (0, 50), 4, seed=2)
    assert [int(other.sample(i)[0]) for i in range(len(other))] != epochs[0]
    unshuffled = DocumentStream(source, (0, 50), 4, seed=2, shuffle=False)
    assert [int(unshuffled.sample(i)[0]) for i in range(4)] == [0, 4, 7, 11]


def test_spans_begin_in_earlier_pieces():
    """A piece in the midst of a span is learnt; a span never reaches into the next document."""
    source = Numbered([20, 10])
    spans = Marking(spans=Spans((2, 3), (12,)))
    stream = DocumentStream(source, (0, 2), 4, seed=0, shuffle=False, marking=spans)
    learnt = [sample.tokens[1:][sample.learnt[1:]].tolist() for sample in map(stream.marked, range(len(stream)))]
    assert learnt == [[4], [5, 6, 7, 8], [9, 10, 11, 12], [], [], [], [], []]


def test_lengths_of_documents_in_files(tmp_path):
    lengths = [3, 0, 5, 1, 0, 0, 9]
    with IndexedWriter(tmp_path / "data", 100, empty_documents_have_a_sequence=False) as writer:
        writer.add_many(np.arange(sum(lengths)), np.array(lengths, dtype=np.int32))
    dataset = IndexedDataset(tmp_path / "data")
    for first in range(8):
        for behind in range(first, 8):
            assert dataset.document_lengths(first, behind).tolist() == lengths[first:behind]
    with pytest.raises(IndexError, match="documents 3 to 8 are outside the 7"):
        dataset.document_lengths(3, 8)
    stream = DocumentStream(dataset, (0, 7), 4, seed=0, vocab_size=18)
    assert len(stream) == 1 + 1 + 2
    DocumentStream(dataset, (0, 7), 4, seed=0, vocab_size=18, shuffle=False).sample(3)
    with pytest.raises(DataError, match=r"token number 17 is 17, outside model\.vocab_size=17"):
        DocumentStream(dataset, (0, 7), 4, seed=0, vocab_size=17, shuffle=False).sample(3)
