"""From a checkpoint of any layout to a Hugging Face folder, proven by its logits; one layer in memory at a time."""

from pathlib import Path

from torch import Tensor

from megagpt.checkpoint import CheckpointReader
from megagpt.checkpoint.manifest import MANIFEST_HASH
from megagpt.convert.certificate import Certificate
from megagpt.convert.layerwise import LayerwiseTransformer
from megagpt.convert.safetensors_stream import TORCH_DTYPES
from megagpt.convert.tables import FAMILIES, Dtype, Family
from megagpt.convert.verify import RELATIVE_TOLERANCE, quiet_transformers, report_logits, require_same_tokens
from megagpt.convert.writer import Export, write_hf_folder
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConversionError
from megagpt.generate import open_checkpoint, single_process_plan, tokenizer_path
from megagpt.host_tensors import MemoryPool, one_thread
from megagpt.layerwise import LayerwiseGPT
from megagpt.parallel.cpu_memory import return_freed_memory
from megagpt.parallel.ranks import start_single_process
from megagpt.storage import Location

AGAINST_MODEL = "the checkpoint's model"
"""The same weights in megagpt's own model, both computing in fp32."""
AGAINST_TRAINING = "the training ranks"
"""The logits that the training ranks computed, in the run's precision, when they saved the checkpoint."""
PROBE_POSITIONS = 32
"""Positions of the probe that are compared; a checkpoint may keep logits of more."""


def export_checkpoint(
    checkpoint: Location,
    output: Path,
    dtype: Dtype = "float32",
    tokenizer: str | None = None,
    overwrite: bool = False,
    family: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    workers: int = 1,
) -> Export:
    """Write a checkpoint's model as a Hugging Face folder and compare its logits with the trained model's.

    Args:
        checkpoint: a checkpoint, or the checkpoint directory of a run (its newest one is taken).
        output: target folder.
        dtype: type of the stored weights; float32 keeps the master weights exactly.
        tokenizer: tokenizer file; default: the one that the run was trained with.
        overwrite: replace an earlier export.
        family: name of the family to export to; default: the first that expresses the model.
        max_shard_bytes: largest weight file.
        workers: processes that write weight files side by side; the bytes do not depend on it.

    Returns:
        The export; its certificate compares with AGAINST_MODEL and AGAINST_TRAINING.

    Raises:
        CheckpointError: there is no intact checkpoint.
        ConversionError: the model has no counterpart, the target exists, the tokenizer is not that of the run, or the
            logits differ (the folder is kept as `output` with `.failed` appended; the message says where the first
            difference is).
        DataError: the tokenizer is missing or damaged.
    """
    reader = open_checkpoint(checkpoint)
    run, manifest = reader.run, reader.manifest
    facts = {
        "step": manifest.step,
        "tokens": manifest.samples * (run.training.seq_length or 0),
        "trained in": manifest.precision,
        **{name: f"{value:.4f}" for name, value in manifest.metrics.items()},
        **manifest.versions,
    }
    chosen = tokenizer_path(reader, tokenizer)
    if tokenizer is not None and run.data.tokenizer is not None:
        _require_size(Tokenizer.load(tokenizer), run.model.vocab_size)
    wanted = None if family is None else _family(family, reader)
    if wanted is not None and chosen is not None:
        require_same_tokens(wanted, run.model, chosen)
    with one_thread():
        return write_hf_folder(
            output,
            run.model,
            reader.stored,
            reader.names,
            chosen,
            dtype,
            max_shard_bytes,
            card=facts,
            overwrite=overwrite,
            read_rows=reader.stored_rows,
            certify=lambda folder: certify(folder, reader, dtype),
            family=wanted,
            workers=workers,
        )


def certify(folder: Path, reader: CheckpointReader, dtype: Dtype) -> Certificate:
    """Compare what transformers computes from a folder with the checkpoint that it was made from.

    Args:
        folder: a Hugging Face folder.
        reader: the checkpoint.
        dtype: type that the folder's weights were rounded to.

    Raises:
        ConversionError: transformers is missing or cannot load the folder.
    """
    tokens_BS, trained_BPV = reader.probe()
    positions = min(trained_BPV.shape[1], PROBE_POSITIONS)
    tokens_BS, trained_BPV = tokens_BS[:, :positions], trained_BPV[:, :positions]
    ranks = start_single_process()
    return_freed_memory()
    memory = MemoryPool()
    # Compare what was stored, not what rounding made of it.
    ours = LayerwiseGPT(single_process_plan(reader), reader, TORCH_DTYPES[dtype], ranks.device, memory)
    coarser = RELATIVE_TOLERANCE[dtype] if dtype != "float32" else 0.0
    tolerance = max(reader.manifest.probe_tolerance, coarser) * max(1.0, float(trained_BPV.abs().max()))
    with quiet_transformers():
        theirs = LayerwiseTransformer(folder, memory)
        logits_BPV = theirs.logits(tokens_BS)
        comparisons = {
            AGAINST_MODEL: report_logits(logits_BPV, ours.logits(tokens_BS)),
            AGAINST_TRAINING: report_logits(logits_BPV, trained_BPV, tolerance),
        }
        passed = all(report.passed for report in comparisons.values())
        first = None if passed else first_difference(ours, theirs, tokens_BS)
    source = {
        "step": reader.manifest.step,
        "samples": reader.manifest.samples,
        "precision": reader.manifest.precision,
        "weights_stored_as": dtype,
        "manifest_sha256": (reader.folder / MANIFEST_HASH).read_text().strip(),
        "run": reader.manifest.run,
    }
    return Certificate(comparisons, source, first)


def first_difference(ours: LayerwiseGPT, theirs: LayerwiseTransformer, tokens_BS: Tensor) -> str:
    """The first part that computes something else from the same input: each layer is given what theirs was given."""
    found: list[str] = []
    last: Tensor | None = None

    def compare(what: str, here: Tensor, there: Tensor) -> None:
        tolerance = RELATIVE_TOLERANCE["float32"] * max(1.0, float(there.abs().max()))
        if not found and not float((here - there).abs().max()) <= tolerance:
            found.append(what)

    def observe(index: int, given_BSH: Tensor, made_BSH: Tensor) -> None:
        nonlocal last
        if found:
            return
        if index == 0:
            compare("the embedding", ours.embed(tokens_BS).transpose(0, 1).cpu(), given_BSH)
        made = ours.layer(index, given_BSH.transpose(0, 1).contiguous().to(ours.device))
        compare(f"layer {index} (counted from 0)", made.transpose(0, 1).cpu(), made_BSH)
        last = made_BSH

    logits_BSV = theirs.logits(tokens_BS, observe)
    if not found and last is not None:
        compare("the final norm or head", ours.head(last.transpose(0, 1).contiguous().to(ours.device)), logits_BSV)
    return found[0] if found else "no layer: the checkpoint's weights are not those that its probe was computed with"


def _family(name: str, reader: CheckpointReader) -> Family:
    known = {family.name: family for family in FAMILIES}
    if name not in known:
        raise ConversionError(f"family {name} is unknown; it can be {', '.join(known)}")
    if obstacles := known[name].obstacles(reader.run.model):
        raise ConversionError(f"family {name} cannot express this model: {'; '.join(obstacles)}")
    return known[name]


def _require_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Training with a tokenizer has made sure that it has exactly the model's tokens."""
    if tokenizer.vocab_size != vocab_size:
        raise ConversionError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens but the model {vocab_size}; give the one "
            "that it was trained with"
        )
