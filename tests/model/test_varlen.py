"""torch's kernel for runs of tokens: when it is used, and that it takes what it is given."""

import inspect

import pytest
import torch

from megagpt.model import varlen


def test_the_kernel_of_this_torch_takes_what_it_is_given():
    """Where torch has it; its arguments are looked at, as it needs a GPU."""
    if (found := varlen.torchs_kernel()) is None:
        pytest.skip("this torch has no such kernel, and runs are attended to one after the other")
    query, key, value = (torch.zeros(3, heads, 8) for heads in (4, 2, 2))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    inspect.signature(found).bind(
        query, key, value, starts, starts, 3, 3, scale=0.3, window_size=(-1, 0), enable_gqa=True
    )


class Query:
    """What is looked at of a query."""

    def __init__(self, is_cuda: bool, dtype: torch.dtype):
        self.is_cuda, self.dtype = is_cuda, dtype


@pytest.mark.parametrize(
    ("query", "dropout", "is_used"),
    [
        (Query(True, torch.bfloat16), 0.0, True),
        (Query(True, torch.float16), 0.0, True),
        (Query(True, torch.bfloat16), 0.1, False),
        (Query(True, torch.float32), 0.0, False),
        (Query(False, torch.bfloat16), 0.0, False),
    ],
)
def test_it_is_used_on_gpus_in_16_bits_without_dropout(monkeypatch, query, dropout, is_used):
    monkeypatch.setattr(varlen, "torchs_kernel", lambda: "kernel")
    assert (varlen.kernel_of_runs(query, dropout) == "kernel") is is_used
