"""The one interface to tokenizers of all kinds.

Our own sentencepiece models do not normalise text, so that decoding gives back what was encoded, with one exception
that lies in sentencepiece itself: it writes a space as U+2581, so a literal U+2581 comes back as a space.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from megagpt.errors import DataError
from megagpt.tokenization.codec import Codec
from megagpt.tokenization.declared import Declared, Kind, find_tokenizer, read_declared
from megagpt.tokenization.huggingface_json import HuggingFaceCodec
from megagpt.tokenization.sentencepiece_model import SentencepieceCodec
from megagpt.tokenization.special_in_text import with_special_in_text
from megagpt.tokenization.tiktoken_ranks import TiktokenCodec

# Entries of tokenizer_config.json that change ids; the fingerprint of a tokenizer covers them.
_SETTINGS_IN_FINGERPRINT = (
    "bos_token",
    "eos_token",
    "pad_token",
    "pat_str",
    "special_tokens",
    "split_special_tokens",
)


class Tokenizer:
    """A tokenizer file. Ids run from 0 to vocab_size - 1.

    Attributes:
        path: the file (of a folder, the file in it).
        kind: "sentencepiece", "huggingface" or "tiktoken".
        codec: the library behind it.
        sha256: fingerprint, carried by a dataset's manifest: the hash of the file, and of the declarations beside it.
        vocab_size: number of ids.
        eod_id: end-of-document token.
        bos_id, pad_id: begin-of-sequence and padding tokens; None where there are none.
        special_tokens: all special tokens, text -> id.
    """

    def __init__(self, path: Path, kind: Kind, codec: Codec, sha256: str):
        """Use `Tokenizer.load`."""
        self.path = path
        self.kind = kind
        self.codec = codec
        self.sha256 = sha256
        self.vocab_size = codec.vocab_size
        self.eod_id = codec.special.eod
        self.bos_id = codec.special.bos
        self.pad_id = codec.special.pad
        self.special_tokens = codec.special.texts
        self._prefix, self._suffix = list(codec.special.prefix), list(codec.special.suffix)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer: a file, or a folder that holds tokenizer.json.

        Raises:
            DataError: there is none, it is damaged, its library is missing, or no token ends documents.
        """
        found, kind, content = find_tokenizer(path)
        if kind == "sentencepiece":
            return cls(found, kind, SentencepieceCodec(found, content), _fingerprint(content, None))
        declared = read_declared(found.parent)
        make = HuggingFaceCodec if kind == "huggingface" else TiktokenCodec
        return cls(found, kind, make(found, content, declared), _fingerprint(content, declared))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with what the tokenizer itself puts around it (see `SpecialIds`), without end-of-document.

        Raises:
            DataError: the text has lone surrogates, which no UTF-8 file can hold.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, in order, on `threads` threads of the tokenizer's library.

        Raises:
            DataError: a text has lone surrogates, which no UTF-8 file can hold.
        """
        try:
            found = self.codec.encode_batch(texts, threads)
        except Exception:  # each library raises its own
            for text in texts:
                if (fault := encoding_fault(text)) is not None:
                    raise DataError(f"text {text[:40]!r} cannot be encoded: {fault}") from None
            raise
        if self._prefix or self._suffix:
            found = [self._prefix + ids + self._suffix for ids in found]
        return found

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are spelt out, and mean themselves; nothing is put around it.

        Raises:
            DataError: the text has lone surrogates, which no UTF-8 file can hold.
        """
        return list(with_special_in_text(self.codec).encode_batch([text], 1)[0])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a list of ids; special tokens give no text.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token {token} is outside tokenizer {self.path} (0 to {self.vocab_size - 1})")
        return self.codec.decode(ids)


def _fingerprint(content: bytes, declared: Declared | None) -> str:
    digest = hashlib.sha256(content)
    if declared is not None:
        told = {key: declared.settings[key] for key in _SETTINGS_IN_FINGERPRINT if key in declared.settings}
        digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()


def encoding_fault(text: str) -> str | None:
    """Why a text has no UTF-8 form, or None if it has one (JSON escapes can spell halves of surrogate pairs)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}"
    return None
