"""JSONL text to a tokenised dataset: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

The main process cuts the inputs into tasks and writes; workers read, parse and encode. Tasks do not depend on the
number of workers and their results are written in order, so neither do the bytes.
"""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

import megagpt
from megagpt.data import manifest as manifests
from megagpt.data.indexed import IndexedWriter, dtype_for_vocabulary
from megagpt.data.jsonl import BadLineError, LineTable, Span, bad_line, parse_text, read_lines, scan_spans
from megagpt.data.manifest import InputFile, Manifest
from megagpt.data.order import keyed_permutation_array
from megagpt.data.progress import ByteProgress
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import DataError

OnBadLine = Literal["error", "skip"]
Task = tuple[Span, ...]

_LINES_PER_TASK = 256
# Results that may wait for their turn, per worker: bounds memory when one task is slow.
_TASKS_AHEAD = 4


@dataclass(frozen=True)
class _Encoded:
    """Result of one task: tokens [sum of lengths] and lengths [documents], and what was left out."""

    tokens: np.ndarray
    lengths: np.ndarray
    skipped_empty: int
    skipped_bad: int
    num_bytes: int


class _Encoder:
    """What a worker needs to turn spans of lines into tokens."""

    def __init__(self, tokenizer_path: str, text_key: str, append_eod: bool, on_bad_line: OnBadLine):
        self.tokenizer = Tokenizer.load(tokenizer_path)
        self.text_key = text_key
        self.append_eod = append_eod
        self.on_bad_line = on_bad_line
        self.dtype = dtype_for_vocabulary(self.tokenizer.vocab_size)

    def encode(self, task: Task) -> _Encoded:
        texts: list[str] = []
        skipped_empty = skipped_bad = 0
        for span in task:
            for number, _, line in read_lines(span):
                try:
                    text = parse_text(line, self.text_key)
                except BadLineError as error:
                    if self.on_bad_line == "error":
                        raise bad_line(span.path, number, error) from None
                    skipped_bad += 1
                    continue
                if text:
                    texts.append(text)
                else:
                    skipped_empty += 1
        documents = self.tokenizer.encode_batch(texts)
        if self.append_eod:
            for document in documents:
                document.append(self.tokenizer.eod_id)
        lengths = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
        tokens = np.empty(int(lengths.sum(dtype=np.int64)), dtype=self.dtype)
        start = 0
        for document in documents:
            tokens[start : start + len(document)] = document
            start += len(document)
        return _Encoded(tokens, lengths, skipped_empty, skipped_bad, sum(span.num_bytes for span in task))


_encoder: _Encoder | None = None


def _start_worker(make_encoder: partial[_Encoder]) -> None:
    global _encoder
    _encoder = make_encoder()


def _encode_in_worker(task: Task) -> _Encoded:
    assert _encoder is not None, "the pool's initializer has run"
    return _encoder.encode(task)


def _encode_all(make_encoder: partial[_Encoder], tasks: Iterable[Task], workers: int) -> Iterator[_Encoded]:
    """Encode tasks by `workers` processes (1: in this one); results come in the order of the tasks."""
    if workers == 1:
        yield from map(make_encoder().encode, tasks)
        return
    # Spawned, not forked: a fork while the progress bar's thread holds a lock would hang.
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (make_encoder,)) as pool:
        waiting: deque = deque()
        for task in tasks:
            waiting.append(pool.apply_async(_encode_in_worker, (task,)))
            if len(waiting) >= workers * _TASKS_AHEAD:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def _plan_tasks(inputs: list[str], seed: int | None) -> tuple[list[InputFile], Iterable[Task]]:
    """Hash the inputs and cut them into tasks, in file order or (with a seed) in random order of documents."""
    scans = [scan_spans(path) for path in inputs]
    spans = [span for file_spans, _ in scans for span in file_spans]
    files = [file for _, file in scans]
    if seed is None:
        return files, ((span,) for span in spans)
    lines = LineTable()
    for span in spans:
        lines.add(span)
    return files, _shuffled_tasks(lines, seed)


def _shuffled_tasks(lines: LineTable, seed: int) -> Iterator[Task]:
    for start in range(0, len(lines), _LINES_PER_TASK):
        # Not numpy's generators: their streams may change between versions.
        rows = np.arange(start, min(start + _LINES_PER_TASK, len(lines)))
        yield tuple(lines.span(int(row)) for row in keyed_permutation_array(rows, len(lines), seed))


def preprocess(
    inputs: Iterable[str | Path],
    prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    text_key: str = "text",
    append_eod: bool = True,
    seed: int | None = None,
    workers: int = 1,
    on_bad_line: OnBadLine = "error",
) -> Manifest:
    """Tokenise JSONL files into PREFIX.bin, PREFIX.idx and PREFIX.json; a dataset of that name is replaced.

    The same inputs and options give the same bytes, whatever `workers`.

    Args:
        inputs: JSONL files: one object a line, UTF-8; blank lines are ignored.
        prefix: path of the output without .bin/.idx/.json.
        tokenizer_path: sentencepiece .model.
        text_key: key of the text in each object.
        append_eod: end each document with the tokenizer's end-of-document token.
        seed: order documents randomly by this seed (20-30 bytes of memory a document); None keeps their order.
        workers: processes that encode.
        on_bad_line: refuse a line that is no document, or skip and count it.

    Raises:
        DataError: an input, the tokenizer or a line cannot be used, there is no document, or nothing can be written.
            No output is left under its final name, except a dataset that was there before.
    """
    paths = [str(path) for path in inputs]
    if not paths:
        raise DataError("no input file was given; give one JSONL file or more")
    if workers < 1:
        raise DataError(f"workers={workers} must be 1 or more")
    tokenizer = Tokenizer.load(tokenizer_path)
    files, tasks = _plan_tasks(paths, seed)
    make_encoder = partial(_Encoder, str(tokenizer_path), text_key, append_eod, on_bad_line)
    skipped_empty = skipped_bad = 0
    try:
        with (
            IndexedWriter(prefix, tokenizer.vocab_size) as writer,
            ByteProgress("tokenising", sum(file.bytes for file in files)) as progress,
        ):
            for encoded in _encode_all(make_encoder, tasks, workers):
                writer.add_many(encoded.tokens, encoded.lengths)
                skipped_empty += encoded.skipped_empty
                skipped_bad += encoded.skipped_bad
                progress.advance(encoded.num_bytes)
            if writer.num_documents == 0:
                raise DataError(
                    f"{', '.join(paths)}: no document with text ({skipped_empty} empty, {skipped_bad} bad lines);"
                    f" give JSONL files with text under {text_key!r}"
                )
            # The old manifest must not describe new files, not even for a moment.
            manifests.manifest_path(prefix).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{prefix}.bin/.idx cannot be written ({error.strerror}); free space or choose another"
        ) from error
    manifest = Manifest(
        format=manifests.FORMAT,
        megagpt_version=megagpt.__version__,
        tokenizer_file=Path(tokenizer_path).name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=writer.dtype.name,
        text_key=text_key,
        append_eod=append_eod,
        seed=seed,
        on_bad_line=on_bad_line,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        skipped_empty=skipped_empty,
        skipped_bad=skipped_bad,
        bin_sha256=writer.bin_sha256,
        idx_sha256=writer.idx_sha256,
        inputs=tuple(files),
    )
    manifests.write_manifest(prefix, manifest)
    return manifest
