"""What is allowed of the copies of a tied embedding."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import ADAM, SGD, tiny_plan

from megagpt.verify.verdicts import _tied

NAME = "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("optimizer", "device", "ulps", "is_ok"),
    [
        (ADAM, "cpu", 0, True),
        (ADAM, "cpu", 1, True),  # torch's AdamW on CPUs rounds the last elements of a tensor otherwise
        (ADAM, "cpu", 100, False),
        (ADAM, "cuda", 1, False),
        (SGD, "cpu", 1, False),
    ],
)
def test_tied_copies_differ_by_no_more_than_last_bits(optimizer, device, ulps, is_ok):
    first = np.full((4, 3), 0.02, np.float32)
    last = first.copy()
    last[-1, -1] += ulps * np.spacing(np.float32(0.02))
    plan = tiny_plan("llama-tied", optimizer, pp=2)
    (verdict,) = _tied(plan, [SimpleNamespace(device=device)], {(NAME, 0, 0): first, (NAME, 1, 0): last})
    assert verdict.passed == is_ok
