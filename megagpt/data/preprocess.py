"""Text to tokenised datasets: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

The inputs are cut into units. Each unit becomes files of its own in PREFIX.work, made by any process of any rank; when
all are there, one rank copies them one after the other. So bytes depend neither on processes nor on ranks, a killed job
goes on with the units that are missing, and what stands under the final names is always whole.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import megagpt
from megagpt.data import manifest as manifests
from megagpt.data.documents import read_documents
from megagpt.data.encode import Encoder, Encoding, OnBadLine
from megagpt.data.indexed import IndexedWriter, bin_path, dtype_for_vocabulary, idx_path
from megagpt.data.inputs import Format, Input, find_inputs
from megagpt.data.job_rank import ALONE, JobRank
from megagpt.data.jsonl import BadLineError
from megagpt.data.manifest import InputFile, Manifest, read_manifest
from megagpt.data.merge import merge_units
from megagpt.data.progress import ByteProgress
from megagpt.data.work import DamagedWorkError, Plan, WorkFolder, plan_units
from megagpt.data.workers import Todo, WorkerKilledError, run_here, run_in_processes
from megagpt.errors import DataError
from megagpt.storage.local import remove_temporary
from megagpt.storage.transfer import sha256_of
from megagpt.tokenization.codec import Codec
from megagpt.tokenization.gigatoken_codec import fast_codec
from megagpt.tokenization.tokenizer import Tokenizer

Backend = Literal["auto", "reference", "gigatoken"]
_PROBE_CHARACTERS = 1 << 17
_PROBE_PLACES = 4


@dataclass(frozen=True)
class Job:
    """What to make of what.

    Attributes:
        inputs: files, folders and globs.
        prefix: path of the dataset without .bin; with several text keys PREFIX_KEY_document, as Megatron-LM names them.
        tokenizer: file or folder.
        text_keys: keys (or columns) of the texts; each becomes a dataset.
        append_eod: end each document with the tokenizer's end-of-document token.
        min_length: a document with fewer characters (in any of its texts) is left out; 0 keeps even empty ones, as
            documents without sequences.
        seed: shuffle the documents by this seed; None keeps the order of the inputs.
        on_bad_line: what to do with a line (row, file) that is no document.
        input_format: what the inputs hold, whatever their names say.
        overwrite: replace a dataset of other options or inputs.
        special_tokens_in_text: special tokens that a text spells out mean themselves.
    """

    inputs: Sequence[str | Path]
    prefix: str | Path
    tokenizer: str | Path
    text_keys: Sequence[str] = ("text",)
    append_eod: bool = True
    min_length: int = 1
    seed: int | None = None
    on_bad_line: OnBadLine = "error"
    input_format: Format | None = None
    overwrite: bool = False
    special_tokens_in_text: bool = False

    def prefixes(self) -> list[str]:
        """The dataset of each text key."""
        if len(self.text_keys) == 1:
            return [str(self.prefix)]
        return [f"{self.prefix}_{key}_document" for key in self.text_keys]


def preprocess(inputs: Iterable[str | Path], prefix: str | Path, tokenizer: str | Path, **options: Any) -> Manifest:
    """Tokenise one text of each document with one rank; see `Job` and `run_job` for options and errors."""
    workers = options.pop("workers", 1)
    backend = options.pop("backend", "auto")
    return run_job(Job([*inputs], prefix, tokenizer, **options), workers=workers, backend=backend)[0]


def run_job(
    job: Job, *, ranks: JobRank = ALONE, workers: int = 1, threads: int = 1, backend: Backend = "auto"
) -> list[Manifest]:
    """Do this rank's share; the last rank to finish merges. What users should know goes to stderr.

    Args:
        job: what to make.
        ranks: which process of the job this is.
        workers: processes of this rank.
        threads: threads of the tokenizer's library in each of them.
        backend: "gigatoken" (faster, for tokenizer.json), "reference" (the file's own library) or "auto": gigatoken
            where it gives the same tokens on a probe of the inputs.

    Returns:
        A manifest for each text key; none if other ranks are still at work.

    Raises:
        DataError: an input, the tokenizer or a line cannot be used, there is no document, the dataset exists with other
            options, another job is at work on it, or nothing can be written.
    """
    if min(workers, threads) < 1:
        raise DataError(f"workers={workers} and threads={threads} must be 1 or more")
    if job.min_length < 0:
        raise DataError(f"--min-length {job.min_length} is negative; give 0 (keep all) or more characters")
    if str(job.prefix).endswith("/"):
        raise DataError(f"--output-prefix {job.prefix} is a folder; add a name, as {Path(job.prefix) / 'dataset'}")
    if not job.text_keys or len(set(job.text_keys)) < len(job.text_keys):
        raise DataError(f"text keys {', '.join(job.text_keys) or 'are missing'}; give each key once")
    tokenizer = Tokenizer.load(job.tokenizer)
    inputs = find_inputs(job.inputs, job.input_format)
    if (existing := _existing(job, tokenizer, inputs)) is not None:
        return existing
    work = WorkFolder(job.prefix)
    try:
        with work.taken_by(ranks.rank, _plan(job, tokenizer, inputs, ranks)) as (plan, notice):
            _tell(notice)
            try:
                _do_share(job, work, plan, ranks.rank, tokenizer, workers, threads, backend)
                return _merge(job, work, plan, tokenizer)
            except (WorkerKilledError, DamagedWorkError):
                raise
            except DataError:
                # With an input that must be mended, what was done so far is of no use.
                if ranks.world_size == 1:
                    work.remove()
                raise
    except OSError as error:
        raise DataError(
            f"{job.prefix}.bin/.idx cannot be written ({error.strerror or error}); free space or choose another"
            " --output-prefix, and start again to go on"
        ) from error


def _tell(notice: str) -> None:
    if notice:
        print(notice, file=sys.stderr, flush=True)


def _identity(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """Whatever has an influence on the bytes, beside the inputs."""
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "text_keys": list(job.text_keys),
        "append_eod": job.append_eod,
        "min_length": job.min_length,
        "seed": job.seed,
        "on_bad_line": job.on_bad_line,
        "special_tokens_in_text": job.special_tokens_in_text,
    }


def _plan(job: Job, tokenizer: Tokenizer, inputs: list[Input], ranks: JobRank) -> Plan:
    return Plan(_identity(job, tokenizer), inputs, plan_units(inputs), ranks.world_size)


def _existing(job: Job, tokenizer: Tokenizer, inputs: list[Input]) -> list[Manifest] | None:
    """The manifests of a complete dataset of the same things; None if there is none, or it is to be replaced.

    Raises:
        DataError: there is a dataset of other things.
    """
    found: list[Manifest] = []
    for key, prefix in zip(job.text_keys, job.prefixes(), strict=True):
        files = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
        if not manifests.manifest_path(prefix).exists() or len(files) < 2:
            # What a killed merge has left has a work folder beside it.
            if files and not job.overwrite and not WorkFolder(job.prefix).path.exists():
                raise DataError(
                    f"{files[0]} exists, of unknown origin; pass --overwrite to replace it, or choose another"
                    " --output-prefix"
                )
            return None
        manifest = read_manifest(prefix)
        assert manifest is not None, "it exists"
        wanted = _identity(job, tokenizer) | {"text_key": key}
        del wanted["text_keys"]
        changed = [
            f"{k}: {getattr(manifest, k)} before, {v} now" for k, v in wanted.items() if getattr(manifest, k) != v
        ]
        if not changed and not _same_inputs(manifest.inputs, inputs):
            changed = ["the inputs have changed"]
        if changed:
            if job.overwrite:
                return None
            raise DataError(
                f"{prefix} exists and was made differently ({', '.join(changed)}); pass --overwrite to replace it, or"
                " choose another --output-prefix"
            )
        size = bin_path(prefix).stat().st_size
        if size != manifest.num_tokens * dtype_for_vocabulary(manifest.vocab_size).itemsize:
            return None
        found.append(manifest)
    _tell(f"{job.prefix} is complete already, of the same inputs and options: nothing to do")
    return found


def _same_inputs(known: Sequence[InputFile], inputs: Sequence[Input]) -> bool:
    if [file.path for file in known] != [source.path for source in inputs]:
        return False
    for file, source in zip(known, inputs, strict=True):
        if file.bytes != source.bytes:
            return False
        # Touched or copied: the content decides.
        if file.modified_ns != source.modified_ns and file.sha256 != sha256_of(Path(source.path)):
            return False
    return True


def _do_share(
    job: Job,
    work: WorkFolder,
    plan: Plan,
    rank: int,
    tokenizer: Tokenizer,
    workers: int,
    threads: int,
    backend: Backend,
) -> None:
    """Do the units of a rank."""
    todo = Todo(work, plan, rank)
    fast: Codec | None = None
    if todo.units and backend != "reference":
        fast, reason = fast_codec(tokenizer, _probe(job, plan))
        if fast is None and backend == "gigatoken":
            raise DataError(f"--backend gigatoken: {reason}; use --backend auto")
        if fast is None and tokenizer.kind == "huggingface":
            _tell(f"the tokenizers library encodes, which is slower: {reason}")
    encoding = Encoding(
        tokenizer=str(job.tokenizer),
        text_keys=tuple(job.text_keys),
        append_eod=job.append_eod,
        min_length=job.min_length,
        on_bad_line=job.on_bad_line,
        threads=threads,
        fast=fast is not None,
        special_tokens_in_text=job.special_tokens_in_text,
    )
    with ByteProgress("tokenising", todo.total_bytes) as progress:
        progress.skip(todo.total_bytes - todo.left_bytes)
        if workers == 1 or len(todo.units) + len(todo.hashes) < 2:
            run_here(work, plan, Encoder(encoding, fast or tokenizer.codec), todo, progress)
        else:
            run_in_processes(work, plan, encoding, todo, progress, workers)


def _probe(job: Job, plan: Plan) -> list[str]:
    """Texts from some places of the inputs."""
    places = sorted(
        {i * (len(plan.units) - 1) // (_PROBE_PLACES - 1) for i in range(_PROBE_PLACES)} if plan.units else ()
    )
    texts: list[str] = []
    for place in places:
        part = plan.units[place][0]
        characters = 0
        documents = read_documents(plan.inputs[part.file], part.start, part.stop, job.text_keys)
        for document in islice(documents, 1000):
            for text in document.texts if document.fault is None else ():
                try:
                    whole = text if isinstance(text, str) else next(iter(text()), "")
                except BadLineError:
                    continue
                texts.append(whole[: _PROBE_CHARACTERS // len(places)])
                characters += len(texts[-1])
            if characters >= _PROBE_CHARACTERS // len(places):
                break
    return texts


def _merge(job: Job, work: WorkFolder, plan: Plan, tokenizer: Tokenizer) -> list[Manifest]:
    """Merge if all units are done and no other rank does; returns the manifests, none if there is more to come."""
    if not work.is_complete(plan):
        return []
    with work.merging() as mine:
        if not mine:
            return []
        files = tuple(
            InputFile(source.path, source.bytes, source.modified_ns, work.input_hash(index))
            for index, source in enumerate(plan.inputs)
        )
        done = [work.done(number) for number in range(len(plan.units))]
        short, bad = (sum(unit[what] for unit in done) for what in ("skipped_short", "skipped_bad"))
        if not any(sum(unit["tokens"]) for unit in done):
            raise DataError(
                f"{', '.join(map(str, job.inputs))}: no document with text ({short} too short, {bad} bad lines); give"
                f" files with text under {', '.join(map(repr, job.text_keys))}"
            )
        made = []
        for key, prefix in enumerate(job.prefixes()):
            remove_temporary(bin_path(prefix), idx_path(prefix))  # of a merge that was killed
            with IndexedWriter(prefix, tokenizer.vocab_size, empty_documents_have_a_sequence=False) as writer:
                merge_units(work, len(plan.units), key, writer, job.seed)
                writer.finish()
                # The old manifest must not describe new files, not even for a moment; but stays if the disk is full.
                manifests.manifest_path(prefix).unlink(missing_ok=True)
            made.append(_manifest(job, job.text_keys[key], tokenizer, writer, short, bad, files))
            manifests.write_manifest(prefix, made[-1])
        work.remove()
    return made


def _manifest(
    job: Job,
    text_key: str,
    tokenizer: Tokenizer,
    writer: IndexedWriter,
    short: int,
    bad: int,
    files: tuple[InputFile, ...],
) -> Manifest:
    return Manifest(
        format=manifests.FORMAT,
        megagpt_version=megagpt.__version__,
        tokenizer_file=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=writer.dtype.name,
        text_key=text_key,
        append_eod=job.append_eod,
        min_length=job.min_length,
        seed=job.seed,
        on_bad_line=job.on_bad_line,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        skipped_short=short,
        skipped_bad=bad,
        bin_sha256=writer.bin_sha256,
        idx_sha256=writer.idx_sha256,
        inputs=files,
        special_tokens_in_text=job.special_tokens_in_text,
    )
