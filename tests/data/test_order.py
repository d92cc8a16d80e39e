"""Each epoch is a permutation, and the order never changes between versions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.order import keyed_permutation, keyed_permutation_array, sample_position

SIZES = [1, 2, 3, 5, 16, 17, 1023, 1024, 1025, 10007]
GOLDEN_PERMUTATION = [2, 6, 4, 8, 5, 7, 0, 9, 3, 1]
GOLDEN_POSITIONS = [(0, 3), (0, 4), (0, 1), (0, 0), (0, 2), (1, 3), (1, 0), (1, 2), (1, 1), (1, 4), (2, 3), (2, 2)]
GOLDEN_LARGE = [810946805862, 980220543702, 757756413833]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, -3])
def test_permutation_is_a_bijection(size, key):
    images = keyed_permutation_array(np.arange(size), size, key)
    assert sorted(images.tolist()) == list(range(size))


@given(size=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_array_and_scalar_agree(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    one_by_one = [keyed_permutation(index, size, key) for index in indices]
    assert keyed_permutation_array(np.array(indices), size, key).tolist() == one_by_one
    assert all(0 <= image < size for image in one_by_one)


def test_golden_order():
    # These values are part of every run that was ever started: resuming one must see the same samples.
    assert [keyed_permutation(i, 10, 1) for i in range(10)] == GOLDEN_PERMUTATION
    assert [sample_position(i, 5, 1234) for i in range(12)] == GOLDEN_POSITIONS
    assert [keyed_permutation(i, 10**12 + 39, 99) for i in (0, 1, 10**12)] == GOLDEN_LARGE


@pytest.mark.parametrize("size", [1023, 1025, 10007])
def test_epochs_are_permutations_and_differ(size):
    epochs = [[sample_position(epoch * size + i, size, 7) for i in range(size)] for epoch in range(2)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(position for _, position in epoch) == list(range(size))
    agreeing = sum(a[1] == b[1] for a, b in zip(*epochs, strict=True))
    # Two random permutations agree in one place on average.
    assert agreeing < 12


def test_seeds_differ():
    orders = {tuple(sample_position(i, 1000, seed)[1] for i in range(20)) for seed in range(50)}
    assert len(orders) == 50


def test_order_looks_random():
    size = 10007
    images = keyed_permutation_array(np.arange(size), size, 5).astype(float)
    # Correlation of position with image, and of neighbours: about N(0, 1 / size) for random permutations.
    for lag_a, lag_b in ((np.arange(size), images), (images[:-1], images[1:])):
        assert abs(np.corrcoef(lag_a, lag_b)[0, 1]) < 5 / np.sqrt(size)
    # Every image of position 0 should be about equally likely over keys.
    firsts = np.bincount([keyed_permutation(0, 5, key) for key in range(2000)], minlength=5)
    assert firsts.min() > 320
    assert firsts.max() < 480


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0), (0, 2**62 + 1)])
def test_out_of_range(index, size):
    with pytest.raises(ValueError, match="outside"):
        keyed_permutation(index, size, 0)
    with pytest.raises(ValueError, match="outside"):
        keyed_permutation_array(np.array([index]), size, 0)


def test_sample_position_refuses_negative_index():
    with pytest.raises(ValueError, match="global_index=-1"):
        sample_position(-1, 5, 0)
