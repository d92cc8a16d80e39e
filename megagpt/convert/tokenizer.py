"""A sentencepiece BPE model as the files that Hugging Face's AutoTokenizer loads, with the same ids.

sentencepiece merges, of all neighbouring symbols whose concatenation is a piece, the pair whose piece has the highest
score, the leftmost first on a tie. The `tokenizers` library merges by the rank of a (left, right) pair. Every way to
cut a piece in two pieces therefore becomes a merge, ordered by score; for one piece the longer left part comes first,
which is what "leftmost first" means where two such pairs overlap (`aba` in `ab|a|ba`).
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.convert.family import TokenIds
from megagpt.errors import ConversionError, DataError

SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type


@dataclass(frozen=True)
class Pieces:
    """What a sentencepiece BPE model consists of; the place in `texts` is the id."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    unk: int
    ids: TokenIds

    def of_kind(self, kind: int) -> list[str]:
        """Pieces of one kind, by id."""
        return [text for text, has in zip(self.texts, self.kinds, strict=True) if has == kind]


def read_pieces(path: str | Path) -> Pieces:
    """Read a sentencepiece .model file whose encoding can be reproduced exactly.

    Raises:
        DataError: the file is missing or not a sentencepiece model.
        ConversionError: the model has a setting that the exported tokenizer could not reproduce.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such tokenizer file; give the sentencepiece .model that made the data") from None
    except (DecodeError, OSError) as error:
        raise DataError(f"{path}: not a sentencepiece .model file ({error}); give the one that made the data") from None
    if not proto.pieces:
        raise DataError(f"{path}: not a sentencepiece .model file (no pieces); give the one that made the data")
    _check_settings(path, proto.trainer_spec, proto.normalizer_spec)
    trainer = proto.trainer_spec
    pieces = Pieces(
        texts=tuple(piece.piece for piece in proto.pieces),
        scores=tuple(piece.score for piece in proto.pieces),
        kinds=tuple(piece.type for piece in proto.pieces),
        unk=trainer.unk_id,
        ids=TokenIds(*(None if i < 0 else i for i in (trainer.bos_id, trainer.eos_id, trainer.pad_id))),
    )
    _check_pieces(path, pieces)
    return pieces


def _check_settings(path: str | Path, trainer: Any, normalizer: Any) -> None:
    wrong = []
    if trainer.model_type != _BPE:
        wrong.append("model_type is not bpe")
    if not trainer.byte_fallback:
        wrong.append("byte_fallback is false")
    if trainer.treat_whitespace_as_suffix:
        wrong.append("treat_whitespace_as_suffix is true")
    if normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv:
        wrong.append(f"normalization_rule_name is {normalizer.name}, not identity")
    for setting, needed in (
        ("add_dummy_prefix", False),
        ("remove_extra_whitespaces", False),
        ("escape_whitespaces", True),
    ):
        if getattr(normalizer, setting) != needed:
            wrong.append(f"{setting} is {str(not needed).lower()}")
    if wrong:
        raise ConversionError(
            f"{path}: {', '.join(wrong)}: such a tokenizer has no exact Hugging Face counterpart here; "
            "export without a tokenizer, or use one from tools/train_tokenizer.py"
        )


def _check_pieces(path: str | Path, pieces: Pieces) -> None:
    """Merges exist only between pieces: each character of a longer piece must be a piece of its own."""
    alone = set(pieces.of_kind(_NORMAL))
    orphans = sorted({char for text in alone for char in text if char not in alone})
    if orphans:
        raise ConversionError(f"{path}: characters {''.join(orphans[:20])!r} occur in pieces without being pieces")
    if unused := pieces.of_kind(_UNUSED):
        raise ConversionError(f"{path}: unused pieces ({unused[:5]}) have no Hugging Face counterpart; retrain it")


def merges_of(pieces: Pieces) -> list[tuple[str, str]]:
    """All merges of the model in their order: descending score, then id, then the longer left part."""
    scores = {
        text: score
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
        if kind == _NORMAL
    }
    merges = []
    for text, _ in sorted(scores.items(), key=lambda item: -item[1]):  # stable: equal scores stay in order of ids
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in scores and text[cut:] in scores:
                merges.append((text[:cut], text[cut:]))
    return merges


def words_are_separable(pieces: Pieces) -> bool:
    """Whether no piece has a space mark behind another character, so that text can be cut before each run of marks."""
    return not any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", text) for text in pieces.of_kind(_NORMAL))


def build_tokenizer(pieces: Pieces) -> Any:
    """The `tokenizers.Tokenizer` with the same ids as the sentencepiece model.

    Raises:
        ConversionError: the `tokenizers` library (part of the `hf` extra) is not installed.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    except ModuleNotFoundError:
        raise ConversionError("exporting a tokenizer needs transformers; run pip install 'megagpt[hf]'") from None
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(pieces.texts)},
            merges=merges_of(pieces),
            unk_token=pieces.texts[pieces.unk],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARK)
    if words_are_separable(pieces):
        # Only for speed: without it, one heap of merges runs over the whole document.
        words = Regex(f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [pieces.texts[pieces.unk], *pieces.of_kind(_CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    # User-defined pieces are found in the normalised text, as sentencepiece does, and never merged with neighbours.
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in pieces.of_kind(_USER_DEFINED)])
    return tokenizer


def export_tokenizer(path: str | Path, folder: str | Path, vocab_size: int, max_length: int) -> TokenIds:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and tokenizer.model into a folder.

    No `<s>` precedes a document in training: each document follows the end-of-document token, which is therefore
    declared as both beginning and end, as GPT-2 and GPT-NeoX do. Text that looks like a special token (`</s>`) is
    encoded as ordinary characters, as sentencepiece does (`split_special_tokens`).

    Args:
        path: sentencepiece .model file.
        folder: where the files go.
        vocab_size: rows of the model's embedding.
        max_length: longest sequence of the model, in tokens.

    Returns:
        The ids for config.json.

    Raises:
        DataError: the file is missing or not a sentencepiece model.
        ConversionError: the tokenizer cannot be reproduced exactly, lacks an end-of-document token or has more pieces
            than the model has rows.
    """
    pieces = read_pieces(path)
    ids = pieces.ids
    if len(pieces.texts) > vocab_size:
        raise ConversionError(
            f"{path} has {len(pieces.texts)} pieces but model.vocab_size={vocab_size}; give the tokenizer of the model"
        )
    if ids.eos is None:
        raise ConversionError(
            f"{path}: has no eos piece, which marks the end of a document; retrain it with eos_id >= 0"
        )
    tokenizer = build_tokenizer(pieces)
    special = {
        "bos_token": pieces.texts[ids.eos],
        "eos_token": pieces.texts[ids.eos],
        "unk_token": pieces.texts[pieces.unk],
    }
    if ids.pad is not None:
        special["pad_token"] = pieces.texts[ids.pad]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(path, folder / "tokenizer.model")  # for programs that read sentencepiece; AutoTokenizer does not
    return TokenIds(bos=ids.eos, eos=ids.eos, pad=ids.pad)
