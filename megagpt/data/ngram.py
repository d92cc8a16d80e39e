"""Perplexity of unigram and bigram models: what counting alone achieves, to compare a trained model with."""

import numpy as np


def unigram_perplexity(train_tokens: np.ndarray, test_tokens: np.ndarray, vocab_size: int, added: float = 1.0) -> float:
    """Perplexity of single-token frequencies with `added` counts for each token (Lidstone smoothing).

    Args:
        train_tokens, test_tokens: integers [tokens], 0 to vocab_size - 1.
        vocab_size: number of tokens.
        added: pseudo-count of each token, above 0.

    Returns:
        exp of the mean negative log-probability (natural) of the test tokens.

    Raises:
        ValueError: a text is too short or a token is outside the vocabulary.
    """
    _check(train_tokens, test_tokens, vocab_size, shortest=1)
    return _perplexity(_unigram_probabilities(train_tokens, vocab_size, added)[test_tokens])


def bigram_perplexity(train_tokens: np.ndarray, test_tokens: np.ndarray, vocab_size: int) -> float:
    """Perplexity of token pairs, interpolated with single tokens by Witten-Bell smoothing.

    P(w | v) = (c(v w) + t(v) P(w)) / (c(v) + t(v)), where c counts in the training text and t(v) is the number of
    different successors of v (I. Witten and T. Bell, "The zero-frequency problem", IEEE Trans. Information Theory
    37(4), 1991, method C; interpolated as in S. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for
    Language Modeling", 1998, section 2.5). P(w) is the unigram model with one count added for each token. A v that
    never occurred has P(w | v) = P(w).

    Args:
        train_tokens, test_tokens: integers [tokens], 0 to vocab_size - 1, two tokens or more.
        vocab_size: number of tokens, at most 2**31.

    Returns:
        exp of the mean negative log-probability (natural) of all test tokens but the first, given the token before.

    Raises:
        ValueError: a text is too short or a token is outside the vocabulary.
    """
    _check(train_tokens, test_tokens, vocab_size, shortest=2)
    unigram = _unigram_probabilities(train_tokens, vocab_size, added=1.0)
    pairs, pair_counts = np.unique(_pair_codes(train_tokens, vocab_size), return_counts=True)
    occurrences = np.bincount(train_tokens[:-1], minlength=vocab_size)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)

    test_pairs = _pair_codes(test_tokens, vocab_size)
    at = np.minimum(np.searchsorted(pairs, test_pairs), len(pairs) - 1)
    counts = np.where(pairs[at] == test_pairs, pair_counts[at], 0)
    previous, following = test_tokens[:-1], test_tokens[1:]
    # A token that was never followed gets one imaginary successor, which leaves the unigram model alone.
    novel = np.maximum(successors[previous], 1)
    return _perplexity((counts + novel * unigram[following]) / (occurrences[previous] + novel))


def _unigram_probabilities(tokens: np.ndarray, vocab_size: int, added: float) -> np.ndarray:
    """Smoothed frequencies, float64 [vocab_size]."""
    if not added > 0:
        raise ValueError(f"added={added} must be above 0")
    return (np.bincount(tokens, minlength=vocab_size) + added) / (len(tokens) + added * vocab_size)


def _pair_codes(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """One number for each token and its successor, int64 [tokens - 1]."""
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]


def _perplexity(probabilities: np.ndarray) -> float:
    return float(np.exp(-np.log(probabilities).mean()))


def _check(train_tokens: np.ndarray, test_tokens: np.ndarray, vocab_size: int, shortest: int) -> None:
    for name, tokens in (("train_tokens", train_tokens), ("test_tokens", test_tokens)):
        if len(tokens) < shortest:
            raise ValueError(f"{name} has {len(tokens)} tokens, at least {shortest} are needed")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(
                f"{name} has tokens from {tokens.min()} to {tokens.max()}, outside vocab_size={vocab_size}"
            )
