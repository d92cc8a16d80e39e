"""What there is to see in a dataset: sizes, lengths of documents, texts, samples with their borders, mixtures.

Everything is computed here and told as text; `inspection_page` draws it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megagpt.data.document_samples import DocumentStream
from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import Manifest, manifest_path, read_manifest, verify_files
from megagpt.data.marking import PADDING, MarkedSample
from megagpt.data.mixture import Mixture
from megagpt.data.samples import SampleStream
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import DataError
from megagpt.plan.data_config import DataConfig

_TOKENS_PER_CHUNK = 1 << 22
_BAR = 40
BORDER = "\u27e6document\u27e7"
"""Stands where a sample goes from one document to the next."""
LEARNT, READ = "\u27e6learnt\u27e7", "\u27e6only read\u27e7"
"""Stand where text begins that is predicted, and text that is not, in samples of which not all is."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens, told in ranges that double."""

    smallest: int
    median: int
    mean: float
    largest: int
    num_empty: int
    """Documents without a token."""
    bounds: tuple[int, ...]
    """Lower ends of the ranges: 0, 1, 2, 4, 8, ..."""
    documents: tuple[int, ...]
    """Documents in each range."""
    tokens: tuple[int, ...]
    """Tokens of the documents in each range."""


@dataclass(frozen=True)
class Inspection:
    """What was found out about one dataset."""

    prefix: str
    num_documents: int
    num_tokens: int
    dtype: str
    manifest: Manifest | None
    lengths: Lengths
    checks: tuple[str, ...]
    """What was checked and holds, one sentence each."""


def inspect_dataset(prefix: str | Path, verify: bool = False, vocab_size: int | None = None) -> Inspection:
    """Open, check and measure a dataset.

    Args:
        prefix: path without .bin/.idx.
        verify: read both files in full: compare the checksums of the manifest, and each token with the vocabulary.
        vocab_size: tokens of the tokenizer; None: as the manifest says, if there is one.

    Raises:
        DataError: a file is missing or damaged, or does not fit its companions.
    """
    dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    checks = ["index and size of .bin fit each other"]
    if manifest is not None:
        manifest.require_fits(prefix, dataset.num_documents, dataset.num_tokens)
        checks.append("the manifest describes these files")
    if verify:
        if manifest is not None:
            verify_files(prefix)
            checks.append("checksums of .bin and .idx are those of the manifest")
        else:
            checks.append(f"no checksums to compare: {manifest_path(prefix)} does not exist")
        size = vocab_size if vocab_size is not None else manifest.vocab_size if manifest is not None else None
        if size is not None:
            require_tokens_within(dataset, size)
            checks.append(f"all tokens are within the vocabulary of {size:,}")
    return Inspection(
        str(prefix),
        dataset.num_documents,
        dataset.num_tokens,
        dataset.dtype.name,
        manifest,
        measure_lengths(np.diff(dataset.document_offsets)),
        tuple(checks),
    )


def require_tokens_within(dataset: IndexedDataset, vocab_size: int) -> None:
    """Read all tokens.

    Raises:
        DataError: one is outside the vocabulary.
    """
    for start in range(0, dataset.num_tokens, _TOKENS_PER_CHUNK):
        tokens = dataset.tokens(start, min(start + _TOKENS_PER_CHUNK, dataset.num_tokens))
        outside = (tokens < 0) | (tokens >= vocab_size)
        if outside.any():
            row = int(outside.argmax())
            raise DataError(
                f"{dataset.prefix}: token number {start + row} is {tokens[row]}, outside the vocabulary of "
                f"{vocab_size}; rebuild the dataset with its tokenizer"
            )


def measure_lengths(lengths: np.ndarray) -> Lengths:
    """Sum up lengths of documents, int64 [documents]."""
    if not len(lengths):
        return Lengths(0, 0, 0.0, 0, 0, (), (), ())
    largest = int(lengths.max())
    bounds = [0, *(1 << bit for bit in range(largest.bit_length()))]
    range_of = np.searchsorted(bounds, lengths, side="right") - 1
    return Lengths(
        int(lengths.min()),
        int(np.median(lengths)),
        float(lengths.mean()),
        largest,
        int(np.count_nonzero(lengths == 0)),
        tuple(bounds),
        tuple(np.bincount(range_of, minlength=len(bounds)).tolist()),
        tuple(int(total) for total in np.bincount(range_of, lengths, minlength=len(bounds))),
    )


def describe(found: Inspection) -> list[str]:
    """An inspection as lines of text."""
    lengths = found.lengths
    lines = [
        f"{found.prefix}: {found.num_documents:,} documents, {found.num_tokens:,} tokens ({found.dtype})",
        *(f"  checked: {check}" for check in found.checks),
    ]
    if found.manifest is not None:
        made = found.manifest
        lines.append(
            f"  made by megagpt {made.megagpt_version} with {made.tokenizer_file} ({made.vocab_size:,} tokens)"
        )
        lines += [f"  from {entry.path} ({entry.bytes:,} bytes)" for entry in made.inputs[:5]]
        if len(made.inputs) > 5:
            lines.append(f"  and {len(made.inputs) - 5:,} more files")
    lines.append(
        f"  tokens per document: {lengths.smallest:,} to {lengths.largest:,}, mean {lengths.mean:,.1f}, median "
        f"{lengths.median:,}; {lengths.num_empty:,} empty"
    )
    most = max(lengths.documents, default=0)
    for bound, documents, tokens in zip(lengths.bounds, lengths.documents, lengths.tokens, strict=True):
        if documents:
            bar = "#" * max(1, round(_BAR * documents / most))
            share = tokens / max(found.num_tokens, 1)
            lines.append(f"  {range_name(bound):>19}  {documents:>12,}  {share:>5.1%} of tokens  {bar}")
    return lines


def range_name(bound: int) -> str:
    """The lengths from a bound up to its double, such as `64-127`."""
    return f"{bound:,}" if bound < 2 else f"{bound:,}-{2 * bound - 1:,}"


def decoded_documents(prefix: str | Path, tokenizer: Tokenizer, count: int, characters: int = 300) -> Iterator[str]:
    """Texts of `count` documents spread evenly over a dataset, each after a line that tells which; cut to a length."""
    dataset = IndexedDataset(prefix)
    count = min(count, dataset.num_documents)
    for i in range(count):
        index = i * dataset.num_documents // count
        tokens = dataset.document(index)
        yield f"document {index:,} ({len(tokens):,} tokens)"
        yield _cut(tokenizer.decode(tokens[: 4 * characters]), characters)


def decoded_sample(
    dataset: IndexedDataset,
    stream: SampleStream | DocumentStream,
    index: int,
    tokenizer: Tokenizer,
    characters: int = 600,
) -> Iterator[str]:
    """Text of the sample that a run sees after `index` others, with its place, the borders of documents in it, what is
    learnt of it and its padding."""
    sample = stream.marked(index)
    borders = sample.places == 0
    if isinstance(stream, DocumentStream):
        first, start, stop = stream.place(index)
    else:
        start, stop = stream.token_range(index)
        offsets = dataset.document_offsets
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        if stream.change is None:  # else they have moved, and are known by the ends of documents only
            borders = np.isin(np.arange(start, stop), offsets)
    borders[0] = False
    count = int(borders.sum())
    told = f"sample {index:,}: tokens {start:,} to {stop - 1:,}, from document {first:,} on, {count:,} borders"
    padding, predicted = int((sample.places == PADDING).sum()), len(sample.tokens) - 1
    learnt = int(sample.learnt[1:].sum())
    if padding:
        told += f", {padding:,} tokens of padding"
    if learnt < predicted:
        told += f"; {learnt:,} of {predicted:,} predictions are learnt"
    yield told
    spells = stream.change is not None if isinstance(stream, SampleStream) else False
    text = _with_borders(sample, borders, tokenizer, spells or stream.marks_spans, learnt < predicted - padding)
    yield _cut(text, characters)


def _with_borders(
    sample: MarkedSample, borders: np.ndarray, tokenizer: Tokenizer, spells: bool, tells_learnt: bool
) -> str:
    """The text of a sample without its padding, with what stands at its borders.

    Args:
        sample: the sample.
        borders: [tokens] where documents begin, but for the first.
        tokenizer: its tokenizer.
        spells: special tokens are spelt out: they tell what was done, and where spans begin.
        tells_learnt: whether to tell what is learnt.
    """
    real = sample.places != PADDING
    turns = np.zeros(len(borders), dtype=bool)
    if tells_learnt:
        turns[0], turns[1:] = True, sample.learnt[1:] != sample.learnt[:-1]
    shown: list[str] = []
    for begin, end in pairwise([0, *np.flatnonzero((borders | turns) & real).tolist(), int(real.sum())]):
        if begin == end:
            continue
        shown += [BORDER] if borders[begin] else []
        shown += [LEARNT if sample.learnt[begin] else READ] if turns[begin] else []
        piece = sample.tokens[begin:end]
        shown.append(_with_special_tokens(piece, tokenizer) if spells else tokenizer.decode(piece))
    return " ".join(shown)


def describe_options(config: DataConfig) -> list[str]:
    """The sample options of a run that are not the default, one phrase each."""
    defaults = DataConfig().sample_options
    return [f"data.{key}: {value}" for key, value in config.sample_options.items() if value != defaults[key]]


def _with_special_tokens(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens, with special tokens spelt out."""
    texts = {token: text for text, token in tokenizer.special_tokens.items()}
    places = np.flatnonzero(np.isin(tokens, list(texts)))
    shown = []
    for piece in np.split(tokens, np.unique(np.concatenate([places, places + 1]))):
        special = len(piece) == 1 and int(piece[0]) in texts
        shown.append(texts[int(piece[0])] if special else tokenizer.decode(piece))
    return "".join(shown)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text) - characters:,} more characters)"


def mixture_table(mixture: Mixture, first_step: int, num_steps: int, global_batch_size: int) -> list[str]:
    """Samples of each dataset in the next steps, and what each has had and should have had behind the last one."""
    width = max(10, *(len(name) + 2 for name in mixture.names))
    lines = [f"{'step':>8}" + "".join(f"{name:>{width}}" for name in mixture.names)]
    before = mixture.counts(first_step * global_batch_size)
    for step in range(first_step, first_step + num_steps):
        counts = mixture.counts((step + 1) * global_batch_size)
        lines.append(f"{step + 1:>8,}" + "".join(f"{a - b:>{width},}" for a, b in zip(counts, before, strict=True)))
        before = counts
    samples = (first_step + num_steps) * global_batch_size
    lines.append(f"{'read':>8}" + "".join(f"{count:>{width},}" for count in before))
    lines.append(f"{'wanted':>8}" + "".join(f"{want:>{width},.1f}" for want in wanted_samples(mixture, samples)))
    return lines


def wanted_samples(mixture: Mixture, num_samples: int) -> list[float]:
    """What the shares come to over the first samples of a run, stage by stage."""
    firsts = [step.first_sample for step in mixture.steps]
    ends = [*firsts[1:], num_samples]
    wanted = [0.0] * len(mixture.names)
    for step, first, end in zip(mixture.steps, firsts, ends, strict=True):
        length = max(min(end, num_samples) - first, 0)
        wanted = [total + float(share * length) for total, share in zip(wanted, step.shares, strict=True)]
    return wanted
