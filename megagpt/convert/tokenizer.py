"""A tokenizer of any kind as the files that Hugging Face's AutoTokenizer loads, with the same ids."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.convert import sentencepiece_to_hf, tiktoken_to_hf
from megagpt.convert.family import TokenIds
from megagpt.errors import ConversionError
from megagpt.tokenization.declared import CONFIG_FILE, HF_FILE, SPECIAL_FILE, read_declared
from megagpt.tokenization.tiktoken_ranks import TiktokenCodec
from megagpt.tokenization.tokenizer import Tokenizer

_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}  # AutoTokenizer then takes tokenizer.json as it is
# Files of a Hugging Face folder that belong to the tokenizer and are taken over as they are.
_CARRIED = (SPECIAL_FILE, "chat_template.jinja", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")

_AS_TEXT = "Text that looks like a special\ntoken is encoded as ordinary characters; pass `split_special_tokens=False`"
_FROM_MODEL = f"""
The tokenizer gives the ids of the {{}} it was made from. A document begins after the end-of-document
token, which is therefore both `bos_token` and `eos_token`; none is added to a prompt. {_AS_TEXT}
to have it recognised.
"""
_UNIGRAM = """
Where two ways to cut a word are equally good, it may choose the other one than sentencepiece, whose sums are rounded.
"""
_TAKEN_OVER = """
The tokenizer is the one that the model was trained with, as it was.
"""


@dataclass(frozen=True)
class ExportedTokenizer:
    """What the rest of an export needs to know: ids for config.json, and a paragraph for the model card."""

    ids: TokenIds
    card: str


def export_tokenizer(path: str | Path, folder: str | Path, vocab_size: int, max_length: int) -> ExportedTokenizer:
    """Write tokenizer.json, tokenizer_config.json and what belongs to them into a folder.

    sentencepiece and tiktoken: no `<s>` precedes a document in training; each document follows the end-of-document
    token, which is therefore declared as both beginning and end, as GPT-2 and GPT-NeoX do. Text that looks like a
    special token (`</s>`) is encoded as ordinary characters, as these libraries do (`split_special_tokens`).

    Args:
        path: tokenizer file or folder.
        folder: where the files go.
        vocab_size: rows of the model's embedding.
        max_length: longest sequence of the model, in tokens.

    Raises:
        DataError: the tokenizer is missing or damaged.
        ConversionError: the tokenizer cannot be reproduced exactly, or has more tokens than the model has rows.
    """
    tokenizer, folder = Tokenizer.load(path), Path(folder)
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"{path} has {tokenizer.vocab_size} tokens but model.vocab_size={vocab_size}; give the model's tokenizer"
        )
    limits = {"model_max_length": max_length}
    if tokenizer.kind == "huggingface":
        return _take_over(tokenizer, folder, limits)
    texts = {token: text for text, token in tokenizer.special_tokens.items()}
    special = {"bos_token": texts[tokenizer.eod_id], "eos_token": texts[tokenizer.eod_id]}
    is_unigram = False
    if tokenizer.kind == "sentencepiece":
        pieces = sentencepiece_to_hf.read_pieces(tokenizer.path)
        built = sentencepiece_to_hf.build_tokenizer(pieces)
        is_unigram = pieces.is_unigram
        special["unk_token"] = pieces.texts[pieces.unk]
        # for programs that read sentencepiece; AutoTokenizer does not
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    else:
        assert isinstance(tokenizer.codec, TiktokenCodec), "the kind says so"
        built = tiktoken_to_hf.build_tokenizer(tokenizer.codec, tokenizer.path)
    if tokenizer.pad_id is not None:
        special["pad_token"] = texts[tokenizer.pad_id]
    built.save(str(folder / HF_FILE))
    settings = {
        **_CLASS,
        **special,
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        **limits,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / CONFIG_FILE, settings)
    _write_json(folder / SPECIAL_FILE, special)
    made_from = "sentencepiece model" if tokenizer.kind == "sentencepiece" else "tiktoken encoding"
    ids = TokenIds(bos=tokenizer.eod_id, eos=tokenizer.eod_id, pad=tokenizer.pad_id)
    return ExportedTokenizer(ids, _FROM_MODEL.format(made_from) + (_UNIGRAM if is_unigram else ""))


def _take_over(tokenizer: Tokenizer, folder: Path, limits: dict[str, Any]) -> ExportedTokenizer:
    """Copy the files of a Hugging Face tokenizer; what we found out about it is written down."""
    shutil.copyfile(tokenizer.path, folder / HF_FILE)
    for name in _CARRIED:
        if (source := tokenizer.path.parent / name).is_file():
            shutil.copyfile(source, folder / name)
    own = read_declared(tokenizer.path.parent)
    texts = {token: text for text, token in tokenizer.special_tokens.items()}
    # A file without any declaration has an end-of-document token all the same.
    end = {} if own.eod is not None or tokenizer.eod_id not in texts else {"eos_token": texts[tokenizer.eod_id]}
    _write_json(folder / CONFIG_FILE, {**limits, **own.settings, **end, **_CLASS})
    ids = TokenIds(bos=tokenizer.bos_id, eos=tokenizer.eod_id, pad=tokenizer.pad_id)
    return ExportedTokenizer(ids, _TAKEN_OVER)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
