"""Perplexities agree with a plain count and are those of probability distributions."""

import math
import time
from collections import Counter

import numpy as np
import pytest

from megagpt.data.ngram import bigram_perplexity, unigram_perplexity

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 9, 300)
TEST = RNG.integers(0, 11, 80)
VOCABULARY = 11


def plain_unigram(token):
    return (Counter(TRAIN.tolist())[token] + 1) / (len(TRAIN) + VOCABULARY)


def plain_bigram(previous, token):
    pairs = Counter(zip(TRAIN.tolist(), TRAIN.tolist()[1:], strict=False))
    followers = {b for a, b in pairs if a == previous}
    if not followers:
        return plain_unigram(token)
    occurrences = sum(count for (a, _), count in pairs.items() if a == previous)
    return (pairs[previous, token] + len(followers) * plain_unigram(token)) / (occurrences + len(followers))


def test_unigram_agrees_with_plain_counts():
    expected = math.exp(-sum(math.log(plain_unigram(int(token))) for token in TEST) / len(TEST))
    assert unigram_perplexity(TRAIN, TEST, VOCABULARY) == pytest.approx(expected, rel=1e-12)


def test_bigram_agrees_with_plain_counts():
    steps = list(zip(TEST.tolist(), TEST.tolist()[1:], strict=False))
    assert {9, 10} & {previous for previous, _ in steps}, "unseen contexts are part of the test"
    expected = math.exp(-sum(math.log(plain_bigram(*step)) for step in steps) / len(steps))
    assert bigram_perplexity(TRAIN, TEST, VOCABULARY) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("previous", [0, 8, 9, 10])
def test_bigram_probabilities_add_up_to_one(previous):
    # 1 / perplexity of a single step is its probability.
    total = sum(1 / bigram_perplexity(TRAIN, np.array([previous, token]), VOCABULARY) for token in range(VOCABULARY))
    assert total == pytest.approx(1.0, rel=1e-12)


def test_known_cases():
    uniform = np.arange(1000) % 10
    assert unigram_perplexity(uniform, uniform, 10) == pytest.approx(10)
    # Each token determines the next.
    assert bigram_perplexity(uniform, uniform, 10) < 1.1
    random = RNG.integers(0, 10, 50000)
    assert bigram_perplexity(random, RNG.integers(0, 10, 5000), 10) == pytest.approx(10, rel=0.01)


def test_disk_types_give_the_same():
    assert bigram_perplexity(TRAIN.astype(np.uint16), TEST.astype(np.uint16), 60000) == bigram_perplexity(
        TRAIN, TEST, 60000
    )


def test_a_million_tokens_take_less_than_some_seconds():
    tokens = (RNG.zipf(1.3, 1_000_000) % 4096).astype(np.uint16)
    start = time.perf_counter()
    assert 1 < bigram_perplexity(tokens, tokens[:100000], 4096) < unigram_perplexity(tokens, tokens[:100000], 4096)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("perplexity", [unigram_perplexity, bigram_perplexity])
def test_bad_input(perplexity):
    with pytest.raises(ValueError, match="test_tokens has 0 tokens"):
        perplexity(TRAIN, TEST[:0], VOCABULARY)
    with pytest.raises(ValueError, match="train_tokens has 0 tokens"):
        perplexity(TRAIN[:0], TEST, VOCABULARY)
    with pytest.raises(ValueError, match="outside vocab_size=5"):
        perplexity(TRAIN, TEST, 5)


def test_added_must_be_positive():
    with pytest.raises(ValueError, match="added=0"):
        unigram_perplexity(TRAIN, TEST, VOCABULARY, added=0)
