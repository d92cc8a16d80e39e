"""Fill-in-the-middle: documents of a sample are cut in three and put in another order, so that the model learns to
write what stands between two texts (Bavarian et al. 2022, arXiv 2207.14255: context-level, on tokens).

    prefix, suffix, middle (PSM):  <prefix> prefix <suffix> suffix <middle> middle
    suffix, prefix, middle (SPM):  <prefix> <suffix> suffix <middle> prefix middle

What is done to a sample is a function of the seed and of its number in its dataset alone.
"""

from dataclasses import dataclass

import numpy as np

from megagpt.data.order import uniform_numbers
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import DataError
from megagpt.plan.data_config import FillInMiddle

_SHORTEST = 3
"""Tokens of a document that can be cut in three."""
_DRAWS = 4
"""Random numbers for each document: whether, which order, and two cuts."""


@dataclass(frozen=True)
class MiddleFiller:
    """Rearranges samples."""

    rate: float
    """Probability with which a document is rearranged."""
    spm_rate: float
    """Probability with which a rearranged document has its suffix first."""
    prefix_id: int
    middle_id: int
    suffix_id: int
    eod_id: int
    """Ends documents; stays where it is."""
    seed: int

    def __call__(self, tokens: np.ndarray, number: int) -> np.ndarray:
        """Rearrange the documents of a sample.

        Args:
            tokens: int64 [tokens].
            number: samples drawn from the dataset before it.

        Returns:
            int64 [tokens]: for each document rearranged, three tokens at the end of the sample make place.
        """
        ends = np.flatnonzero(tokens == self.eod_id)
        pieces = np.split(tokens, np.unique(np.concatenate([ends, ends + 1])))  # a document, its end, the next one, ...
        draws = uniform_numbers(self.seed, number, _DRAWS * len(pieces)).reshape(-1, _DRAWS)
        changed = [self._rearranged(piece, draw) for piece, draw in zip(pieces, draws, strict=True)]
        return np.concatenate(changed)[: len(tokens)]

    def _rearranged(self, document: np.ndarray, draw: np.ndarray) -> np.ndarray:
        whether, which, *cuts = draw
        if len(document) < _SHORTEST or whether >= self.rate:
            return document
        first, second = sorted(int(cut * (len(document) + 1)) for cut in cuts)
        prefix, middle, suffix = document[:first], document[first:second], document[second:]
        if which < self.spm_rate:
            parts = [[self.prefix_id, self.suffix_id], suffix, [self.middle_id], prefix, middle]
        else:
            parts = [[self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id], middle]
        return np.concatenate([np.asarray(part, dtype=document.dtype) for part in parts])


def make_middle_filler(config: FillInMiddle, tokenizer: Tokenizer, seed: int) -> MiddleFiller:
    """What the run config asks for.

    Raises:
        DataError: the tokenizer lacks one of the special tokens.
    """
    ids = {}
    for role in ("prefix", "middle", "suffix"):
        text = getattr(config, f"{role}_token")
        if text not in tokenizer.special_tokens:
            known = ", ".join(tokenizer.special_tokens) or "none"
            raise DataError(
                f"data.fill_in_middle.{role}_token={text} is no special token of {tokenizer.path} (it has {known}); "
                "name one of these, or train a tokenizer with it (--special-tokens)"
            )
        ids[role] = tokenizer.special_tokens[text]
    return MiddleFiller(
        config.rate, config.spm_rate, ids["prefix"], ids["middle"], ids["suffix"], tokenizer.eod_id, seed
    )
