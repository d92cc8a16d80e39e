"""What there is to know of a sample besides its tokens: where documents begin, and which tokens are learnt.

Both are functions of the tokens of the sample and of those before it in its document.

Shapes: S sequence; a sample has S + 1 tokens, of which all but the first are predicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PADDING = -1
"""Place of a token that fills up a sample."""
Before = Callable[[int], np.ndarray]
"""Gives so many tokens that stand before the sample, fewer if the text (or document) begins there."""


class MarkedSample(NamedTuple):
    """A sample and what is known of it."""

    tokens: np.ndarray
    """int64 [S + 1]."""
    places: np.ndarray
    """int64 [S + 1]: place of each token in its document, or in the sample if the document began before it; `PADDING`
    behind the last one."""
    learnt: np.ndarray
    """bool [S + 1]: whether a token is predicted; the first one never is, whatever stands here."""


@dataclass(frozen=True)
class Spans:
    """Parts of documents that are learnt: what stands behind a pattern of tokens."""

    start: tuple[int, ...]
    """Tokens behind which a span begins."""
    end: tuple[int, ...] | None
    """Tokens that end a span, of which they are part; None: it reaches to the end of its document."""

    def learnt(self, tokens: np.ndarray, before: Before, length: int, eod_id: int | None) -> np.ndarray:
        """Which tokens are in spans.

        Args:
            tokens: int64 [tokens].
            before: gives the tokens that precede them.
            length: how many of these to look at first.
            eod_id: token with which documents, and their spans, end; None: what is given is of one document.

        Returns:
            bool [tokens].
        """
        longest = max(len(self.start), len(self.end or ()))
        length = max(length, longest)
        while True:
            context = before(length)
            text = np.concatenate([context, tokens])
            places, opens = self._changes(text, eod_id)
            if len(context) < length:
                break
            # Where the context begins, a pattern may have begun before it.
            whole = places >= longest
            places, opens = places[whole], opens[whole]
            if len(places) and places[0] <= len(context):
                break
            length *= 4  # the span's beginning is farther away
        states = np.concatenate([[False], opens])
        return states[np.searchsorted(places, np.arange(len(context), len(text)), side="right")]

    def _changes(self, text: np.ndarray, eod_id: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Where spans begin (True) and end (False), in order; of several at one place the last one holds."""
        found = [(find(text, self.start), True)]
        if self.end is not None:
            found.insert(0, (find(text, self.end), False))
        if eod_id is not None:
            found.insert(0, (np.flatnonzero(text == eod_id) + 1, False))
        places = np.concatenate([where for where, _ in found])
        opens = np.concatenate([np.full(len(where), opens) for where, opens in found])
        order = np.argsort(places, kind="stable")
        return places[order], opens[order]


def find(text: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """Where a pattern of tokens ends in a text: indices of the tokens behind it, in order."""
    if len(text) < len(pattern):
        return np.empty(0, dtype=np.int64)
    size = len(text) - len(pattern) + 1
    candidates = np.flatnonzero(text[:size] == pattern[0])
    for offset, token in enumerate(pattern[1:], 1):
        candidates = candidates[text[candidates + offset] == token]
    return candidates + len(pattern)


@dataclass(frozen=True)
class Marking:
    """How samples are marked."""

    eod_id: int | None = None
    """Token that ends documents; None: what is given is of one document."""
    masks_borders: bool = False
    """Whether the first token of a document is not learnt."""
    spans: Spans | None = None
    """What is learnt; None: everything."""

    def mark(self, tokens: np.ndarray, before: Before, length: int) -> MarkedSample:
        """Mark a sample.

        Args:
            tokens: int64 [tokens].
            before: gives the tokens that precede them.
            length: how many of these to look at first.
        """
        index = np.arange(len(tokens))
        begins = np.zeros(len(tokens), dtype=bool)
        if self.eod_id is not None:
            begins[1:] = tokens[:-1] == self.eod_id
        places = index - np.maximum.accumulate(np.where(begins, index, 0))
        learnt = np.ones(len(tokens), dtype=bool)
        if self.spans is not None:
            learnt = self.spans.learnt(tokens, before, length, self.eod_id)
        if self.masks_borders:
            learnt &= ~begins
        return MarkedSample(tokens, places, learnt)


UNMARKED = Marking()
