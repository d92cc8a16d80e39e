"""Hugging Face tokenizer.json by the `tokenizers` library, without transformers.

Ids are those of transformers' PreTrainedTokenizerFast on the same folder: with the tokens that the post-processor puts
around a text, and with special tokens spelt out in a text recognised unless tokenizer_config.json sets
`split_special_tokens`. Truncation and padding are switched off.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.errors import DataError
from megagpt.tokenization.codec import SpecialIds, as_arrays, special_id
from megagpt.tokenization.declared import CONFIG_FILE, Declared

# What ends a document where no file says so, if the vocabulary has exactly one of them.
_KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")  # noqa: RUF001


class HuggingFaceCodec:
    """A tokenizer.json."""

    def __init__(self, path: Path, content: bytes, declared: Declared):
        """Parse a tokenizer.json.

        Raises:
            DataError: the file is damaged, the `tokenizers` library is missing, or no token ends documents.
        """
        self._tokenizer = _parse(path, content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        split_special = declared.settings.get("split_special_tokens", False) is True
        self._tokenizer.encode_special_tokens = split_special
        self.knows_special_in_text = not split_special
        self._threads = 0
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path} has no tokens; give another tokenizer.json")
        self.vocab_size: int = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_texts = [token.content for token in added.values()]
        where = path.parent / CONFIG_FILE
        eod_text = declared.eod or _known_end(path, vocabulary)
        eod = special_id(eod_text, "eos_token", vocabulary, where)
        assert eod is not None, "a text was given"
        prefix, suffix = self._template(path)
        self.special = SpecialIds(
            eod=eod,
            bos=special_id(declared.bos, "bos_token", vocabulary, where),
            pad=special_id(declared.pad, "pad_token", vocabulary, where),
            unk=special_id(declared.unk, "unk_token", vocabulary, where),
            texts={token.content: token_id for token_id, token in added.items() if token.special},
            prefix=prefix,
            suffix=suffix,
        )

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """See `Codec`."""
        self._use_threads(threads)
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_arrays(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """See `Codec`."""
        return as_arrays(self.encode_batch(texts, threads))

    def decode(self, ids: list[int]) -> str:
        """See `Codec`; special tokens give no text."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _use_threads(self, threads: int) -> None:
        """The library reads these variables: the first at each call, the second when its pool starts."""
        if threads != self._threads:
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
            self._threads = threads

    def _template(self, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the post-processor puts before and behind each text."""
        if self._tokenizer.num_special_tokens_to_add(False) == 0:
            return (), ()
        sample = "a b"
        plain = self._tokenizer.encode(sample, add_special_tokens=False).ids
        full = self._tokenizer.encode(sample, add_special_tokens=True).ids
        for at in range(len(full) - len(plain) + 1):
            if full[at : at + len(plain)] == plain:
                return tuple(full[:at]), tuple(full[at + len(plain) :])
        raise DataError(f"{path}: its post_processor does more than put tokens around a text; remove it")


def _parse(path: Path, content: bytes) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise DataError(f"{path} needs the tokenizers library; run pip install 'megagpt[data]'") from None
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a Hugging Face tokenizer.json ({error}); give another one") from None


def _known_end(path: Path, vocabulary: dict[str, int]) -> str:
    found = [text for text in _KNOWN_ENDS if text in vocabulary]
    if len(found) != 1:
        raise DataError(
            f"{path}: no file says which token ends a document (candidates: {', '.join(found) or 'none'});"
            f' write {{"eos_token": "..."}} into {path.parent / CONFIG_FILE}'
        )
    return found[0]
