"""tiktoken rank files (base64 bytes and a rank a line).

Such a file says neither how text is cut into words nor what the special tokens are. The encodings that OpenAI has
published are known by the file's name; for others tokenizer_config.json beside the file says it, in the words of
tiktoken.Encoding: {"pat_str": "...", "special_tokens": {"<|endoftext|>": 50000}, "eos_token": "<|endoftext|>"}.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.errors import DataError
from megagpt.tokenization.codec import SpecialIds, as_arrays, special_id
from megagpt.tokenization.declared import CONFIG_FILE, Declared

_END = "<|endoftext|>"
# From tiktoken_ext.openai_public, whose functions fetch the ranks from the network.
_R50K = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
_O200K = "|".join(
    (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    )
)
_FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_PUBLISHED: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (_R50K, {_END: 50256}),
    "p50k_base": (_R50K, {_END: 50256}),
    "cl100k_base": (
        _CL100K,
        {_END: 100257, **{text: 100258 + i for i, text in enumerate(_FILL_IN)}, "<|endofprompt|>": 100276},
    ),
    "o200k_base": (_O200K, {_END: 199999, "<|endofprompt|>": 200018}),
}


class TiktokenCodec:
    """A tiktoken encoding. Special tokens spelt out in a text stay plain text.

    Attributes:
        ranks: bytes of each ordinary token -> id.
        pattern: regular expression that cuts text into words.
    """

    def __init__(self, path: Path, content: bytes, declared: Declared):
        """Parse a rank file.

        Raises:
            DataError: the file is damaged, tiktoken is missing, or pattern or end-of-document token are not known.
        """
        try:
            import tiktoken
        except ModuleNotFoundError:
            raise DataError(f"{path} needs the tiktoken library; run pip install 'megagpt[data]'") from None
        self.ranks = _parse_ranks(path, content)
        self.pattern, special = _pattern_and_special(path, declared)
        if taken := sorted(set(special.values()) & set(self.ranks.values())):
            raise DataError(f"{path.parent / CONFIG_FILE}: special token id {taken[0]} is an ordinary token too")
        try:
            self._encoding: Any = tiktoken.Encoding(
                path.stem, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=special
            )
        except ValueError as error:
            raise DataError(f"{path.parent / CONFIG_FILE}: pat_str cannot be used ({error})") from None
        self._ordinary = frozenset(self.ranks.values())
        self.vocab_size = max(*self.ranks.values(), *special.values()) + 1
        where = path.parent / CONFIG_FILE
        eod = special_id(declared.eod or (_END if _END in special else None), "eos_token", special, where)
        if eod is None:
            raise DataError(f'{path}: no file says which token ends a document; write "eos_token" into {where}')
        self.special = SpecialIds(
            eod=eod,
            bos=special_id(declared.bos, "bos_token", special, where),
            pad=special_id(declared.pad, "pad_token", special, where),
            texts=special,
        )

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """See `Codec`."""
        for text in texts:
            text.encode()  # the library would replace lone surrogates without a word
        if threads == 1:
            return [self._encoding.encode_ordinary(text) for text in texts]
        return self._encoding.encode_ordinary_batch(texts, num_threads=threads)

    def encode_arrays(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """See `Codec`."""
        return as_arrays(self.encode_batch(texts, threads))

    def decode(self, ids: list[int]) -> str:
        """See `Codec`; special tokens give no text, nor do ids that stand for none."""
        return self._encoding.decode([token for token in ids if token in self._ordinary])


def _parse_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: expected base64 bytes and a rank, found {line[:40]!r}") from None
    if min(ranks.values()) < 0 or len(set(ranks.values())) != len(ranks):
        raise DataError(f"{path}: ranks are negative or occur twice; give an undamaged file")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{path}: byte {missing[0]} is no token, so not every text can be written; give a whole file")
    return ranks


def _pattern_and_special(path: Path, declared: Declared) -> tuple[str, dict[str, int]]:
    pattern, special = declared.settings.get("pat_str"), declared.settings.get("special_tokens")
    if pattern is None and special is None and path.stem in _PUBLISHED:
        return _PUBLISHED[path.stem]
    valid = isinstance(pattern, str) and isinstance(special, dict) and all(type(i) is int for i in special.values())
    if not valid:
        raise DataError(
            f"{path} says neither how to cut text nor which special tokens there are; write pat_str, special_tokens"
            f" and eos_token into {path.parent / CONFIG_FILE} (known by name: {', '.join(_PUBLISHED)})"
        )
    assert isinstance(pattern, str)
    assert isinstance(special, dict)
    return pattern, special
