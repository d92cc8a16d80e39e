"""A sentencepiece model as a tokenizer of the `tokenizers` library, with the same ids.

BPE: sentencepiece merges, of all neighbouring symbols whose concatenation is a piece, the pair whose piece has the
highest score, the leftmost first on a tie. The `tokenizers` library merges by the rank of a (left, right) pair. Every
way to cut a piece in two pieces therefore becomes a merge, ordered by score; for one piece the longer left part comes
first, which is what "leftmost first" means where two such pairs overlap (`aba` in `ab|a|ba`).

Unigram: both look for the segmentation with the highest sum of scores. sentencepiece adds in single precision from the
start of the text, `tokenizers` in double precision word by word: on long texts, segmentations that are equally good but
for rounding may come out differently. Pieces that never come out of a text in sentencepiece (control pieces, bytes) are
ordinary entries in `tokenizers`; they get a score so low that spelling them out is always better.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.convert.family import TokenIds
from megagpt.errors import ConversionError, DataError

SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type


@dataclass(frozen=True)
class Pieces:
    """What a sentencepiece model consists of; the place in `texts` is the id."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    unk: int
    ids: TokenIds
    is_unigram: bool = False

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
        is_unigram=trainer.model_type == _UNIGRAM,
    )
    _check_pieces(path, pieces)
    return pieces


def _check_settings(path: str | Path, trainer: Any, normalizer: Any) -> None:
    wrong = []
    if trainer.model_type not in (_BPE, _UNIGRAM):
        wrong.append("model_type is neither bpe nor unigram")
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
    alone = set(pieces.of_kind(_NORMAL))
    if unused := pieces.of_kind(_UNUSED):
        raise ConversionError(f"{path}: unused pieces ({unused[:5]}) have no Hugging Face counterpart; retrain it")
    if not pieces.is_unigram:
        # Merges exist only between pieces: each character of a longer piece must be a piece of its own.
        orphans = sorted({char for text in alone for char in text if char not in alone})
        if orphans:
            raise ConversionError(f"{path}: characters {''.join(orphans[:20])!r} occur in pieces without being pieces")
        return
    if own := pieces.of_kind(_USER_DEFINED):
        raise ConversionError(
            f"{path}: user-defined pieces ({own[:5]}) of a unigram model have no exact Hugging Face counterpart here;"
            " declare them as special tokens of tools/train_tokenizer.py"
        )
    hidden = {char for text in _hidden(pieces) for char in text.replace(" ", SPACE_MARK)}
    if orphans := sorted(hidden - alone):
        raise ConversionError(
            f"{path}: characters {''.join(orphans[:20])!r} of control and byte pieces are no pieces of their own, so"
            " a text that spells such a piece would be taken for it; train it with tools/train_tokenizer.py"
        )


def _hidden(pieces: Pieces) -> list[str]:
    """Pieces that no text gives rise to."""
    return [text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind != _NORMAL]


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


def _unigram_scores(pieces: Pieces) -> list[tuple[str, float]]:
    """Each piece with its score; hidden ones score less than their spelling in single characters ever does."""
    worst = min(score for score, kind in zip(pieces.scores, pieces.kinds, strict=True) if kind == _NORMAL)
    longest = max(map(len, _hidden(pieces)))
    below = (longest + 1) * min(worst, -1.0)
    return [
        (text, score if kind == _NORMAL else below)
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
    ]


def build_tokenizer(pieces: Pieces) -> Any:
    """The `tokenizers.Tokenizer` with the same ids as the sentencepiece model.

    Raises:
        ConversionError: the `tokenizers` library (part of the `hf` extra) is not installed.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    except ModuleNotFoundError:
        raise ConversionError("exporting a tokenizer needs transformers; run pip install 'megagpt[hf]'") from None
    if pieces.is_unigram:
        model: Any = models.Unigram(_unigram_scores(pieces), unk_id=pieces.unk, byte_fallback=True)
    else:
        model = models.BPE(
            vocab={text: i for i, text in enumerate(pieces.texts)},
            merges=merges_of(pieces),
            unk_token=pieces.texts[pieces.unk],
            fuse_unk=True,
            byte_fallback=True,
        )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARK)
    if words_are_separable(pieces):
        # Only for speed: without it, one search runs over the whole document.
        words = Regex(f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [pieces.texts[pieces.unk], *pieces.of_kind(_CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    # User-defined pieces are found in the normalised text, as sentencepiece does, and never merged with neighbours.
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in pieces.of_kind(_USER_DEFINED)])
    return tokenizer
