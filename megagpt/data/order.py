"""The order of samples: a stateless keyed permutation of each epoch.

A permutation of [0, size) is computed for single indices, so nothing is stored, shared between ranks or rebuilt on
resume. Method: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002): a balanced Feistel
network permutes the smallest even number of bits that covers `size`, and "cycle walking" applies it again until the
result falls inside [0, size), at most four times on average. The round function is the finaliser of SplitMix64
(G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). It is not
cryptographic, and need not be.

The order is part of a run's meaning: changing anything here makes a resumed run see other samples.
"""

from functools import lru_cache

import numpy as np

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# Four rounds are pseudorandom on large domains (Luby and Rackoff 1988); small ones mix better with more.
_ROUNDS = 8
LARGEST_SIZE = 1 << 62


def _mix(value: int) -> int:
    """SplitMix64's finaliser, a bijection on 64 bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _mix_array(value: np.ndarray) -> np.ndarray:
    """`_mix` on an array of uint64, whose products wrap by themselves."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mix((key + (i + 1) * _GOLDEN) & _MASK_64) for i in range(_ROUNDS))


def _half_bits(size: int) -> int:
    """Bits of one half of the Feistel network: the smallest h >= 1 with 4**h >= size."""
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _check(first: int, last: int, size: int) -> None:
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"size={size} is outside 1 to 2**62")
    if first < 0 or last >= size:
        raise ValueError(f"index {first if first < 0 else last} is outside 0 to {size - 1}")


def keyed_permutation(index: int, size: int, key: int) -> int:
    """Image of `index` under the permutation of [0, size) that belongs to `key`.

    Args:
        index: 0 to size - 1.
        size: 1 to 2**62.
        key: any integer; only its lowest 64 bits count.

    Raises:
        ValueError: index or size is out of range.
    """
    _check(index, index, size)
    keys = _round_keys(key & _MASK_64)
    half = _half_bits(size)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = (left << half) | right
        if index < size:
            return index


def keyed_permutation_array(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """`keyed_permutation` of many indices at once: int64 array in, int64 array of the same shape out.

    Raises:
        ValueError: an index or the size is out of range.
    """
    if indices.size == 0:
        return np.empty(indices.shape, np.int64)
    _check(int(indices.min()), int(indices.max()), size)
    keys = [np.uint64(round_key) for round_key in _round_keys(key & _MASK_64)]
    half = np.uint64(_half_bits(size))
    mask = np.uint64((1 << int(half)) - 1)
    images = indices.astype(np.uint64).ravel()
    walking = np.arange(images.size)
    while walking.size:
        left, right = images[walking] >> half, images[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix_array(right ^ round_key) & mask)
        images[walking] = (left << half) | right
        walking = walking[images[walking] >= np.uint64(size)]
    return images.astype(np.int64).reshape(indices.shape)


@lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int) -> int:
    return _mix((_mix(seed & _MASK_64) + epoch * _GOLDEN) & _MASK_64)


def sample_position(global_index: int, samples_per_epoch: int, seed: int) -> tuple[int, int]:
    """Epoch and position within the dataset of the sample that a run sees at `global_index`.

    Each epoch visits each position once, in an order of its own that depends on `seed` alone.

    Args:
        global_index: samples seen before this one, from the start of the run; 0 or more.
        samples_per_epoch: samples of the dataset, 1 or more.
        seed: the run's seed.

    Raises:
        ValueError: an argument is out of range.
    """
    if global_index < 0 or samples_per_epoch < 1:
        raise ValueError(f"global_index={global_index} must be >= 0 and samples_per_epoch={samples_per_epoch} >= 1")
    epoch, index = divmod(global_index, samples_per_epoch)
    return epoch, keyed_permutation(index, samples_per_epoch, _epoch_key(seed, epoch))


def uniform_numbers(seed: int, index: int, count: int) -> np.ndarray:
    """Random numbers in [0, 1) that belong to `index`: float64 [count], functions of seed, index and place."""
    key = _mix((_mix((seed + _GOLDEN) & _MASK_64) + index * _GOLDEN) & _MASK_64)
    places = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    return (_mix_array(places) >> np.uint64(11)).astype(np.float64) / (1 << 53)
