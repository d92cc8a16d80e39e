"""gigatoken (MIT licence), a much faster byte-level BPE, where it gives the ids of the `tokenizers` library.

It is another program, so nothing is taken on trust: it is used only if it agrees on a probe of the actual corpus, one
document of many is encoded twice while it is used, and texts in which an added token is spelt out (where the two are
known to differ) go to the reference. Its cache of words grows without bound; it is made anew when it has grown.
"""

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.errors import DataError
from megagpt.tokenization.codec import Codec
from megagpt.tokenization.huggingface_json import HuggingFaceCodec
from megagpt.tokenization.tokenizer import Tokenizer

_CHECK_EVERY = 1024
_LARGEST_GROWTH_BYTES = 96 << 20
_FEWEST_BYTES_BETWEEN_RENEWALS = 16 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class GigatokenCodec:
    """A tokenizer.json by gigatoken, guarded by the reference."""

    def __init__(self, content: bytes, reference: HuggingFaceCodec):
        """Build it.

        Raises:
            Exception: whatever gigatoken raises for a tokenizer.json that it does not support.
        """
        self._content = content
        self._reference = reference
        self.vocab_size, self.special = reference.vocab_size, reference.special
        self.knows_special_in_text = reference.knows_special_in_text
        self._starts = _common_starts(reference.added_texts)
        self._since_check = 0
        self._renew()
        self._limit = _resident_bytes() + _LARGEST_GROWTH_BYTES

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """See `Codec` and `encode_arrays`."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """See `Codec`.

        Raises:
            DataError: a document that was encoded twice came out differently.
        """
        if self._seen > _FEWEST_BYTES_BETWEEN_RENEWALS and _resident_bytes() > self._limit:
            self._renew()
        left_out = self._that_spell_added_tokens(texts)
        encode = self._encode
        found = [encode(text) for text in texts] if not left_out else []
        for at, text in enumerate(texts if left_out else ()):
            found.append(self._reference.encode_arrays([text], threads)[0] if at in left_out else encode(text))
        self._seen += sum(map(len, texts))
        self._since_check += len(texts)
        if self._since_check >= _CHECK_EVERY:
            self._since_check = 0
            self._compare(texts[-1], found[-1], threads)
        return found

    def _compare(self, text: str, ids: np.ndarray, threads: int) -> None:
        if ids.tolist() != self._reference.encode_batch([text], threads)[0]:
            raise DataError(
                f"gigatoken gives other tokens than the tokenizers library for the text {text[:60]!r}...;"
                " start again with --backend reference"
            )

    def decode(self, ids: list[int]) -> str:
        """See `Codec`."""
        return self._reference.decode(ids)

    def _that_spell_added_tokens(self, texts: list[str]) -> set[int]:
        """Numbers of the texts in which an added token is spelt out."""
        suspects = {at for start in self._starts for at, text in enumerate(texts) if start in text}
        return {at for at in suspects if any(token in texts[at] for token in self._reference.added_texts)}

    def _renew(self) -> None:
        import gigatoken

        self._encode: Any = None  # the old one goes before the new one comes
        _give_freed_memory_back()
        self._encode = gigatoken.Tokenizer.from_json(self._content).backend.encode
        self._seen = 0


def _common_starts(tokens: Iterable[str]) -> list[str]:
    """What tokens begin with (the longer, the faster to look for), one for all that share two characters."""
    groups: dict[str, list[str]] = {}
    for token in tokens:
        groups.setdefault(token[:2], []).append(token)
    return sorted(os.path.commonprefix(group) for group in groups.values())  # noqa: RUF071  # texts, not paths


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def _give_freed_memory_back() -> None:
    """Else the C library keeps it, scattered, and what is resident seems to grow with each new cache."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def fast_codec(tokenizer: Tokenizer, probe: Sequence[str]) -> tuple[Codec | None, str]:
    """A faster codec with the same ids, or None and the reason.

    Args:
        tokenizer: the reference.
        probe: texts of the corpus on which both must agree.
    """
    if not isinstance(tokenizer.codec, HuggingFaceCodec):
        return None, f"there is no faster library for {tokenizer.kind} files"
    if not os.path.exists("/proc/self/statm"):
        return None, "its memory cannot be watched on this system"
    try:
        codec = GigatokenCodec(Path(tokenizer.path).read_bytes(), tokenizer.codec)
        found = codec.encode_batch(list(probe), 1)
    except ModuleNotFoundError:
        return None, "gigatoken is not installed (pip install 'megagpt[data]')"
    except Exception as error:  # the library raises its own
        return None, f"gigatoken does not support this tokenizer ({error})"
    for text, ids, expected in zip(probe, found, tokenizer.codec.encode_batch(list(probe), 1), strict=True):
        if ids != expected:
            return None, f"gigatoken gives other tokens for the text {text[:40]!r}..."
    return codec, ""
