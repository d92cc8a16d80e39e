"""Documents of packed samples: each is attended to as if it stood alone."""

import pytest
import torch

from megagpt.model import documents as module
from megagpt.model.causal_attention import causal_attention
from megagpt.model.documents import PADDING, Documents, document_attention
from megagpt.model.varlen import attend_at_once

CPU = torch.device("cpu")
RUNS = [[5, 1, 9, 7], [22], [3, 3, 8]]
"""Lengths of the documents of three samples of 22 tokens; the last one ends with padding."""


def places(runs=RUNS, length=22, first=0):
    rows = [[place for size in row for place in range(size)] for row in runs]
    rows = [row + [PADDING] * (length - len(row)) for row in rows]
    return torch.tensor(rows)


def documents_of(places_BS, **options):
    return Documents.of(places_BS, CPU, **{"attention": True, "positions": False, "padded": False, **options})


def test_borders_are_found():
    found = documents_of(places(), positions=True, padded=True)
    assert found.runs == tuple(map(tuple, RUNS))
    assert found.starts.tolist() == [0, 5, 6, 15, 22, 44, 47, 50, 58, 66], "padding is a run of its own"
    assert found.positions_Bs[0].tolist() == [*range(5), 0, *range(9), *range(7)]
    assert found.positions_Bs[2, 14:].tolist() == [0] * 8, "a position that exists"
    assert found.padding_Bs.sum(1).tolist() == [0, 0, 8]


def test_a_context_parallel_rank_has_its_positions_and_all_borders():
    parts = [documents_of(places(), positions=True, padded=True, part=(rank, 2)) for rank in range(2)]
    assert parts[0].runs == parts[1].runs == tuple(map(tuple, RUNS))
    joined = torch.cat([part.positions_Bs for part in parts], 1)
    assert joined.equal(places().clamp(min=0))
    assert parts[1].padding_of(0, 1)[2].sum() == 8
    assert [parts[1].padding_of(part, 11)[2].sum() for part in range(11)] == [0] * 3 + [1] * 8


def qkv(heads=4, groups=2, length=22, batch=3):
    torch.manual_seed(0)
    shapes = [(batch, heads, length, 8), (batch, groups, length, 8), (batch, groups, length, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_a_mask(query, key, value, window=None, softcap=None, scale=0.3):
    """The whole matrix of scores, most of it hidden."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    document = torch.cumsum(places() == 0, 1) * (places() != PADDING)
    same = document[:, :, None] == document[:, None]
    distance = torch.arange(22)[:, None] - torch.arange(22)
    seen = same & (distance >= 0) & (distance < (window or 22))
    return scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1) @ value


def results(function, inputs):
    """Output and gradients; padding has no say in either."""
    output = function(*inputs)
    real = (places() != PADDING)[:, None, :, None]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((output * weights * real).sum(), inputs)
    return [output * real, *gradients]


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 0.7}, {"window": 6, "softcap": 0.7}])
def test_tokens_see_their_own_document_only(options):
    inputs, documents = qkv(), documents_of(places())
    found = results(lambda q, k, v: document_attention(q, k, v, documents, scale=0.3, **options), inputs)
    expected = results(lambda q, k, v: with_a_mask(q, k, v, **options), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_samples_without_borders_are_attended_to_together(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "causal_attention", lambda *a: calls.append(a) or causal_attention(*a))
    query, key, value = qkv()
    whole = documents_of(places([[22]] * 3))
    torch.testing.assert_close(document_attention(query, key, value, whole), causal_attention(query, key, value))
    assert len(calls) == 1


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's varlen_attn does, one run after the other."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0, "causal"
    assert cu_seq_q.dtype == torch.int32
    outputs = []
    for start, stop in zip(cu_seq_q[:-1], cu_seq_k[1:], strict=True):
        assert 0 < stop - start <= max_q == max_k
        q, k, v = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        window = None if window_size[0] < 0 else window_size[0] + 1
        outputs.append(causal_attention(q, k, v, scale, 0.0, window).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4])
def test_one_kernel_can_take_all_documents(window):
    inputs, documents = qkv(), documents_of(places())
    found = results(lambda q, k, v: attend_at_once(kernel, q, k, v, documents.starts, scale=0.3, window=window), inputs)
    expected = results(lambda q, k, v: with_a_mask(q, k, v, window=window), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
