"""A tiktoken encoding as a tokenizer of the `tokenizers` library, with the same ids.

tiktoken merges the two neighbours whose concatenation has the lowest rank; `tokenizers` merges by the rank of a pair.
As in transformers' TikTokenConverter, each way to cut a token in two becomes a merge, ordered by the token's rank.
"""

import re
from typing import Any

from megagpt.errors import ConversionError
from megagpt.tokenization.tiktoken_ranks import TiktokenCodec

# Texts on which a converted tokenizer must agree: patterns may use what the two regular-expression engines read
# differently.
_PROBES = (
    "Hello, World! It's 12345 o'clock; we'LL see.",
    "  two  spaces \n\n\n  lines \t tabs\r\n end   ",
    "def f(x):\n    return {'a': x**2}  # comment\n",
    "naïve façade Straße привет мир こんにちは世界 한국어 मस्ते 👩‍💻",
    "x\n \n y",
    "1234567890 3.14159 ½ ٣",
    "$5.00 a$b zz ...!!!??? --- ___ <|endoftext|></s>",
)


def build_tokenizer(codec: TiktokenCodec, name: object) -> Any:
    """The `tokenizers.Tokenizer` with the same ids.

    Args:
        codec: the encoding.
        name: what to call it in an error.

    Raises:
        ConversionError: the pattern means something else to `tokenizers`, or the library is not installed.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ModuleNotFoundError:
        raise ConversionError("exporting a tokenizer needs transformers; run pip install 'megagpt[hf]'") from None
    spelt = _byte_spelling()
    texts = {token: "".join(spelt[byte] for byte in token) for token in codec.ranks}
    vocabulary = {texts[token]: rank for token, rank in codec.ranks.items()} | codec.special.texts
    merges = [(texts[left], texts[right]) for left, right in _merges(codec.ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=True))
    try:
        words = Regex(_for_oniguruma(codec.pattern))
    except Exception as error:  # the library raises plain Exception
        raise ConversionError(f"{name}: tokenizers cannot use its pat_str ({error}); choose another one") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in codec.special.texts])
    tokenizer.encode_special_tokens = True
    found = [encoding.ids for encoding in tokenizer.encode_batch(list(_PROBES), add_special_tokens=False)]
    for text, ids, expected in zip(_PROBES, found, codec.encode_batch(list(_PROBES), 1), strict=True):
        if ids != expected:
            raise ConversionError(
                f"{name}: its pat_str cuts {text!r} differently in tokenizers ({ids} instead of {expected}), so it has"
                " no exact Hugging Face counterpart; export without a tokenizer"
            )
    return tokenizer


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _for_oniguruma(pattern: str) -> str:
    """tiktoken's pattern for the engine of `tokenizers`, where `$` is the end of a line and `{1,3}+` not possessive."""
    pattern = re.sub(r"(?<!\\)\$", r"\\z", pattern)
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)


def _byte_spelling() -> list[str]:
    """The character by which byte-level tokenizers write each byte (A. Radford et al., GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelt = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelt[byte] for byte in range(256)]
