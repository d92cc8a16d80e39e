"""Write a model as a Hugging Face folder: weights, config, tokenizer, model card and a manifest of all files.

Everything goes into a folder beside the target, is forced to disk and renamed at the end: a reader never sees half an
export. Memory holds one tensor at a time.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import megagpt
from megagpt.convert.canonical import canonical_shapes, check_names
from megagpt.convert.certificate import CERTIFICATE, Certificate
from megagpt.convert.family import Dtype, Family, Read, TokenIds
from megagpt.convert.forked import run_forked
from megagpt.convert.model_card import model_card
from megagpt.convert.safetensors_stream import (
    TORCH_DTYPES,
    WrittenFile,
    plan_shards,
    shard_names,
    write_safetensors,
)
from megagpt.convert.tables import family_for
from megagpt.convert.tokenizer import export_tokenizer
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig
from megagpt.storage.local import sync_path

MANIFEST = "megagpt_export.json"
VOCABULARY = ("embedding.word_embeddings.weight", "head.weight")
BLOCK_BYTES = 32 << 20
"""Size in fp32 of the rows of an embedding or head that are held at once."""

ReadRows = Callable[[str, int, int], Tensor]
"""Rows `first` to `last` - 1 of a canonical tensor whose rows are tokens."""
Blocks = Callable[[str], Iterator[Tensor]]
"""A Hugging Face tensor as consecutive blocks of rows."""


@dataclass(frozen=True)
class Export:
    """What `write_hf_folder` made."""

    folder: Path
    family: str
    parameters: int
    weight_bytes: int
    files: dict[str, WrittenFile]
    certificate: Certificate | None = None
    """What the check has found, if there was one."""


def write_hf_folder(
    folder: str | Path,
    model: ModelConfig,
    read: Read,
    names: Iterable[str],
    tokenizer_path: str | Path | None,
    dtype: Dtype = "float32",
    max_shard_bytes: int = 5_000_000_000,
    card: Mapping[str, object] | None = None,
    overwrite: bool = False,
    read_rows: ReadRows | None = None,
    certify: Callable[[Path], Certificate] | None = None,
    family: Family | None = None,
    workers: int = 1,
) -> Export:
    """Export a model to a folder that transformers loads.

    Args:
        folder: target; its parent is created if need be.
        model: the model as trained.
        read: gives the full tensor of a canonical name (see `canonical.py`), which need only last until the next call.
        names: all canonical names that the source has.
        tokenizer_path: tokenizer file or folder; None exports weights only.
        dtype: type of the stored weights.
        max_shard_bytes: largest weight file, unless one tensor alone is larger.
        card: facts about the training run for the model card: label -> value.
        overwrite: replace an earlier export at `folder`.
        read_rows: gives rows of an embedding or head, so that memory never holds the whole of it; they, too, need
            only last until the next call.
        certify: checks the folder before it appears; what it finds is kept in certificate.json and the model card.
            An export that fails appears as `folder` with `.failed` appended, and nothing is replaced.
        family: family to export to; default: the first that expresses the model.
        workers: processes that write weight files side by side; the bytes do not depend on it.

    Raises:
        ConversionError: no family expresses the model, names or shapes do not fit it, the tokenizer does not fit it,
            weights are not finite, `folder` exists and must not be replaced or cannot be written, or the check failed.
        DataError: the tokenizer file is missing or damaged.
    """
    folder = Path(os.path.abspath(folder))
    family = family or family_for(model, own_tokenizer=tokenizer_path is not None)
    if dtype not in TORCH_DTYPES:
        raise ConversionError(f"dtype={dtype} is unknown; use {', '.join(TORCH_DTYPES)}")
    check_names(names, canonical_shapes(model), "the model to export")
    _check_target(folder, overwrite)
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        export = _write_all(
            partial,
            folder,
            family,
            model,
            _blocks(family, model, read, read_rows),
            tokenizer_path,
            dtype,
            max_shard_bytes,
            card or {},
            certify,
            workers,
        )
        sync_path(partial)
        if export.certificate is not None and not export.certificate.passed:
            failed = _free_name(folder)
            _move_into_place(partial, failed, False)
            raise ConversionError(f"{failed}: {export.certificate.failure}")
        _move_into_place(partial, folder, overwrite)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(f"{folder} cannot be written ({error}); make room, or give another folder") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return export


def _write_all(
    partial: Path,
    folder: Path,
    family: Family,
    model: ModelConfig,
    make: Blocks,
    tokenizer_path: str | Path | None,
    dtype: Dtype,
    max_shard_bytes: int,
    card: Mapping[str, object],
    certify: Callable[[Path], Certificate] | None,
    workers: int,
) -> Export:
    # The tokenizer first: it is small, and what is wrong with it shows before gigabytes are written.
    tokens, tokenizer_note = TokenIds(), None
    if tokenizer_path is not None:
        exported = export_tokenizer(tokenizer_path, partial, model.vocab_size, model.max_position_embeddings)
        tokens, tokenizer_note = exported.ids, exported.card
    files = _write_weights(partial, family, model, make, dtype, max_shard_bytes, workers)
    weight_bytes = sum(file.bytes for name, file in files.items() if name.endswith(".safetensors"))
    parameters = sum(math.prod(shape) for shape in family.hf_shapes(model).values())
    _write_json(partial / "config.json", family.hf_config(model, tokens, dtype))
    special = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    known = {key: value for key, value in special.items() if value is not None}
    _write_json(partial / "generation_config.json", {"_from_model_config": True, **known})
    certificate = None
    if certify is not None:
        certificate = certify(partial)
        hashes = {name: file.sha256 for name, file in sorted(files.items())}
        _write_json(partial / CERTIFICATE, certificate.content(hashes))
        card = {**card, **certificate.rows()}
    text = model_card(folder.name, family, model, parameters, dtype, tokenizer_note, card)
    (partial / "README.md").write_text(text, encoding="utf-8")
    for path in sorted(partial.iterdir()):
        if path.name not in files:
            files[path.name] = _describe(path)
    _write_json(
        partial / MANIFEST,
        {
            "made_by": f"megagpt {megagpt.__version__}",
            "family": family.name,
            "dtype": dtype,
            "parameters": parameters,
            "model": model.model_dump(mode="json"),
            "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in sorted(files.items())},
        },
    )
    sync_path(partial / MANIFEST)
    return Export(folder, family.name, parameters, weight_bytes, files, certificate)


def _write_weights(
    partial: Path,
    family: Family,
    model: ModelConfig,
    make: Blocks,
    dtype: Dtype,
    max_shard_bytes: int,
    workers: int,
) -> dict[str, WrittenFile]:
    """Write the weight files and, for more than one, their index."""
    torch_dtype, all_shapes = TORCH_DTYPES[dtype], family.hf_shapes(model)
    shards = plan_shards(all_shapes, torch_dtype, max_shard_bytes)
    weight_map = dict[str, str]()
    jobs = dict(zip(shard_names(len(shards)), shards, strict=True))

    def write(file_name: str) -> WrittenFile:
        return write_safetensors(partial / file_name, jobs[file_name], torch_dtype, make)

    written = run_forked(write, list(jobs), workers)
    files = dict(zip(jobs, written, strict=True))
    for file_name, shapes in jobs.items():
        weight_map |= dict.fromkeys(shapes, file_name)
    if len(shards) > 1:
        parameters = sum(math.prod(shape) for shape in all_shapes.values())
        metadata = {"total_parameters": parameters, "total_size": parameters * torch_dtype.itemsize}
        _write_json(partial / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return files


def _blocks(family: Family, model: ModelConfig, read: Read, read_rows: ReadRows | None) -> Blocks:
    """What gives the rows of a Hugging Face tensor, a part at a time where that is possible."""
    sources, read_once = family.sources(model), _keep_last(read)

    def make(name: str) -> Iterator[Tensor]:
        source = sources[name]
        if read_rows is None or source.canonical not in VOCABULARY:
            yield family.to_hf(name, read_once, model)
            return
        count, width = source.shape  # whole rows, the same as ours
        step = max(1, BLOCK_BYTES // (4 * width))
        for first in range(0, count, step):
            yield read_rows(source.canonical, first, min(first + step, count))

    return make


def _keep_last(read: Read) -> Read:
    """Query, key and value come from one canonical tensor, one after another: read it once."""
    last: tuple[str, Tensor] | None = None

    def read_once(name: str) -> Tensor:
        nonlocal last
        if last is None or last[0] != name:
            last = None  # frees the previous tensor before the next one is read
            last = (name, read(name))
        return last[1]

    return read_once


# ------------------------------------------------------------------------------------------------------- the folder


def _check_target(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise ConversionError(f"{folder} exists; give another folder or allow overwriting")
    if folder.is_symlink() or not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder; remove it or give another name")
    if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ConversionError(f"{folder} is not an export of megagpt (it has no {MANIFEST}); give another folder")


def _move_into_place(partial: Path, folder: Path, overwrite: bool) -> None:
    """Rename; an earlier export steps aside first and comes back if that fails."""
    _check_target(folder, overwrite)
    aside = None
    if folder.exists():
        aside = folder.parent / f".{folder.name}.replaced-{secrets.token_hex(4)}"
        os.rename(folder, aside)
    try:
        os.rename(partial, folder)
    except OSError:
        if aside is not None:
            os.rename(aside, folder)
        raise
    sync_path(folder.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _free_name(folder: Path) -> Path:
    """`folder` with `.failed` appended, and a number if that is taken."""
    names = (folder.with_name(f"{folder.name}.failed{number}") for number in ["", *(f"-{n}" for n in range(2, 1000))])
    return next(name for name in names if not os.path.lexists(name))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(path: Path) -> WrittenFile:
    """Size and hash of a small file, after forcing it to disk."""
    sync_path(path)
    content = path.read_bytes()
    return WrittenFile(len(content), hashlib.sha256(content).hexdigest())
