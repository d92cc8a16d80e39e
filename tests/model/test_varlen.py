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

    def __init__(self, dtype: torch.dtype, channels: int = 64, is_cuda: bool = True):
        self.dtype, self.is_cuda, self.shape, self.device = dtype, is_cuda, (1, 4, 9, channels), None


@pytest.mark.parametrize(
    ("query", "dropout", "capability", "is_used"),
    [
        (Query(torch.bfloat16), 0.0, (9, 0), True),
        (Query(torch.float16), 0.0, (8, 0), True),
        (Query(torch.float16), 0.0, (7, 0), False),
        (Query(torch.bfloat16, 256), 0.0, (9, 0), True),
        (Query(torch.bfloat16, 264), 0.0, (9, 0), False),
        (Query(torch.bfloat16, 10), 0.0, (9, 0), False),
        (Query(torch.bfloat16), 0.1, (9, 0), False),
        (Query(torch.float32), 0.0, (9, 0), False),
        (Query(torch.bfloat16, is_cuda=False), 0.0, (9, 0), False),
    ],
)
def test_it_is_used_where_torch_takes_what_it_is_given(monkeypatch, query, dropout, capability, is_used):
    monkeypatch.setattr(varlen, "torchs_kernel", lambda: "kernel")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (varlen.kernel_of_runs(query, dropout) == "kernel") is is_used
