"""Where documents begin in a sample, and which of its tokens are learnt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.loader import NOT_LEARNT, Marks, eval_batches, train_batches
from megagpt.data.marking import Marking, Spans, find
from megagpt.data.samples import SampleStream

EOD = 0


class Text:
    """Given tokens."""

    prefix = "text"

    def __init__(self, tokens):
        self.all = np.asarray(tokens)

    def tokens(self, start, stop):
        return self.all[start:stop]


def stream_of(tokens, marking, seq_length=4, **options):
    return SampleStream(Text(tokens), (0, len(tokens)), seq_length, 0, shuffle=False, marking=marking, **options)


def test_documents_begin_behind_their_ends():
    sample = stream_of([5, EOD, 6, 7, 8, EOD, EOD, 9, 9], Marking(EOD, masks_borders=True), 8).marked(0)
    assert sample.places.tolist() == [0, 1, 0, 1, 2, 3, 0, 0, 1]
    assert sample.learnt.tolist() == [True, True, False, True, True, True, False, False, True]


def test_what_is_no_border_by_itself_is_learnt():
    sample = stream_of([5, EOD, 6, 7, 8], Marking(EOD)).marked(0)
    assert sample.learnt.all()
    assert stream_of([5, EOD, 6, 7, 8], Marking()).marked(0).places.tolist() == [0, 1, 2, 3, 4]


def by_hand(tokens, start, end):
    """One token after the other: whether each is in a span."""
    inside, states = False, []
    for i in range(len(tokens)):
        if i and tokens[i - 1] == EOD:
            inside = False
        if end and i >= len(end) and tuple(tokens[i - len(end) : i]) == end:
            inside = False
        if i >= len(start) and tuple(tokens[i - len(start) : i]) == start:
            inside = True
        states.append(inside)
    return states


PATTERN = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=9, max_size=120),
    start=PATTERN,
    end=st.one_of(st.none(), PATTERN),
    seq_length=st.integers(1, 8),
)
def test_spans_do_not_depend_on_where_samples_begin(tokens, start, end, seq_length):
    expected = by_hand(tokens, start, end)
    stream = stream_of(tokens, Marking(EOD, spans=Spans(start, end)), seq_length)
    for i in range(len(stream)):
        first = i * seq_length
        assert stream.marked(i).learnt.tolist() == expected[first : first + seq_length + 1]


def test_patterns_are_found():
    text = np.array([1, 2, 1, 2, 1, 3])
    assert find(text, (1, 2, 1)).tolist() == [3, 5]
    assert find(text, (3,)).tolist() == [6]
    assert find(text, (4,)).tolist() == []
    assert find(text[:2], (1, 2, 1)).tolist() == []


def uneven_stream():
    """Samples of which some have much to learn, some little and some nothing."""
    tokens = np.random.default_rng(3).integers(0, 9, 37 * 4 + 1)
    return stream_of(tokens, Marking(EOD, masks_borders=True, spans=Spans((1,), (2,))))


@pytest.mark.parametrize(("microbatch_size", "size"), [(12, 1), (2, 3), (1, 4), (3, 2)])
def test_the_loss_of_a_step_is_divided_by_what_is_learnt_in_it(microbatch_size, size):
    """On any layout, step by step: sums of losses over loss_tokens, averaged, are means over what is learnt."""
    stream, rounds = uneven_stream(), 12 // microbatch_size // size

    def batches(rank, sum_over_ranks):
        return train_batches(
            stream, first_sample=12, global_batch_size=12, microbatch_size=microbatch_size, data_parallel_rank=rank,
            data_parallel_size=size, marks=Marks(documents=True, loss=True, sum_over_ranks=sum_over_ranks),
        )  # fmt: skip

    learnt_by_rank = [[] for _ in range(size)]
    for rank in range(size):  # what each rank would tell the others
        own = batches(rank, lambda number, rank=rank: learnt_by_rank[rank].append(number) or number)
        for _ in range(3 * rounds):
            next(own)
    totals = [sum(step) for step in zip(*learnt_by_rank, strict=True)]
    expected = [sum(stream.marked(12 + step * 12 + i).learnt[1:].sum() for i in range(12)) for step in range(3)]
    assert totals == expected
    assert len(set(expected)) == 3, "steps differ, or this says little"
    for rank in range(size):
        steps = iter(totals)
        own = batches(rank, lambda _, steps=steps: next(steps))
        for step in range(3):
            counted = 0
            for micro_batch in (next(own) for _ in range(rounds)):
                counted += (micro_batch.labels_BS != NOT_LEARNT).sum()
                assert float(micro_batch.loss_tokens) == pytest.approx(totals[step] / (rounds * size))
                assert micro_batch.places_BS.shape == micro_batch.tokens_BS.shape
            assert counted == learnt_by_rank[rank][step]


def test_labels_are_the_next_tokens_where_they_are_learnt():
    stream = uneven_stream()
    (batch,) = eval_batches(
        stream, num_batches=1, global_batch_size=8, microbatch_size=8, data_parallel_rank=0, data_parallel_size=1,
        marks=Marks(loss=True),
    )  # fmt: skip
    assert batch.places_BS is None
    for i in range(8):
        sample = stream.marked(i)
        expected = np.where(sample.learnt, sample.tokens, NOT_LEARNT)[1:]
        assert batch.labels_BS[i].tolist() == expected.tolist()


def test_an_evaluation_is_one_mean_over_all_that_is_learnt():
    stream = uneven_stream()
    batches = list(
        eval_batches(
            stream,
            num_batches=4,
            global_batch_size=8,
            microbatch_size=4,
            data_parallel_rank=0,
            data_parallel_size=1,
            marks=Marks(loss=True),
        )
    )
    learnt = sum(int(stream.marked(i).learnt[1:].sum()) for i in range(32))
    assert len(batches) == 8
    assert [float(batch.loss_tokens) for batch in batches] == pytest.approx([learnt / 8] * 8)


def test_a_step_with_nothing_to_learn_has_a_loss_of_zero():
    stream = stream_of([1] * 9, Marking(EOD, spans=Spans((2,), None)))
    batch = next(
        train_batches(
            stream,
            first_sample=0,
            global_batch_size=2,
            microbatch_size=2,
            data_parallel_rank=0,
            data_parallel_size=1,
            marks=Marks(loss=True),
        )
    )
    assert (batch.labels_BS == NOT_LEARNT).all()
    assert float(batch.loss_tokens) == 1
