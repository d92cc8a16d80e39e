"""The sample options of a run config as rules on tokens, and whether a dataset can be read by them."""

import re

from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import Manifest
from megagpt.data.marking import Marking, Spans
from megagpt.data.mixture import Samples
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import DataError
from megagpt.plan.data_config import DataConfig

_SAMPLES_LOOKED_AT = 64


def marking_of(config: DataConfig, tokenizer: Tokenizer | None) -> Marking:
    """How the samples of a run are marked.

    Raises:
        DataError: the texts of data.loss_spans have no tokens.
    """
    spans = None
    if config.loss_spans is not None:
        assert tokenizer is not None, "a rule of the config"
        end = config.loss_spans.end
        spans = Spans(
            pattern_of("start", config.loss_spans.start, tokenizer),
            None if end is None else pattern_of("end", end, tokenizer),
        )
    in_stream = config.packing == "stream" and tokenizer is not None
    return Marking(tokenizer.eod_id if in_stream and tokenizer else None, config.eod_mask_loss, spans)


def pattern_of(key: str, text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens of a text in which special tokens are spelt out.

    Raises:
        DataError: there are none, or the text holds something like a special token that the tokenizer does not have.
    """
    for like in re.findall(r"<\|[^|<>]+\|>", text):
        if like not in tokenizer.special_tokens:
            known = ", ".join(tokenizer.special_tokens) or "none"
            raise DataError(
                f"data.loss_spans.{key}={text!r}: {like} is no special token of {tokenizer.path} (it has {known}); "
                "name one of these, or train a tokenizer with it (--special-tokens)"
            )
    found = tuple(tokenizer.encode_with_special(text))
    if not found:
        raise DataError(f"data.loss_spans.{key}={text!r} gives no token with {tokenizer.path}; name another text")
    return found


def require_document_ends(config: DataConfig, dataset: IndexedDataset, manifest: Manifest | None, eod_id: int) -> None:
    """See that the borders of documents can be told from the tokens, if that is asked for.

    Raises:
        DataError: documents do not end with the end-of-document token.
    """
    keys = [key for key in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss") if getattr(config, key)]
    keys += ["loss_spans"] if config.loss_spans is not None and config.packing == "stream" else []
    if not keys or not dataset.num_documents:
        return
    ends = manifest.append_eod if manifest is not None else _first_end(dataset) == eod_id
    if not ends:
        raise DataError(
            f"{dataset.prefix}: documents do not end with the end-of-document token ({eod_id}), by which "
            f"{' and '.join(f'data.{key}' for key in keys)} would know them; build the dataset with --append-eod"
        )


def _first_end(dataset: IndexedDataset) -> int | None:
    """The last token of the first document that has any."""
    for index in range(min(dataset.num_documents, 1000)):
        if len(document := dataset.document(index)):
            return int(document[-1])
    return None


def require_learnt(config: DataConfig, prefix: str, stream: Samples) -> None:
    """See that there is something to learn among some samples spread over an epoch.

    Raises:
        DataError: no token of them is in a span.
    """
    if config.loss_spans is None:
        return
    looked_at = min(len(stream), _SAMPLES_LOOKED_AT)
    if not any(stream.marked(i * len(stream) // looked_at).learnt[1:].any() for i in range(looked_at)):
        raise DataError(
            f"{prefix}: data.loss_spans finds nothing to learn in {looked_at} samples: none holds the tokens of "
            f"start={config.loss_spans.start!r} before others; give the text that begins an answer in this dataset "
            "(tools/inspect_data.py --samples shows them; special tokens get into it by --special-tokens-in-text)"
        )
