"""From a checkpoint of any layout to a Hugging Face folder, proven by its logits."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.convert.safetensors_stream import TORCH_DTYPES
from megagpt.convert.tables import Dtype
from megagpt.convert.verify import RELATIVE_TOLERANCE, LogitsReport, compare_logits
from megagpt.convert.writer import Export, write_hf_folder
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConversionError
from megagpt.generate import load_model, model_logits, tokenizer_path


@dataclass(frozen=True)
class CheckedExport:
    """An export and what its logits say."""

    export: Export
    against_model: LogitsReport
    """Against the same weights in megagpt's own model, both computing in fp32."""
    against_training: LogitsReport
    """Against the logits that the training ranks computed, in the run's precision, when they saved the checkpoint."""


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    dtype: Dtype = "float32",
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> CheckedExport:
    """Write a checkpoint's model as a Hugging Face folder and compare its logits with the trained model's.

    Args:
        checkpoint: a checkpoint, or the checkpoint directory of a run (its newest one is taken).
        output: target folder.
        dtype: type of the stored weights; float32 keeps the master weights exactly.
        tokenizer: tokenizer file; default: the one that the run was trained with.
        overwrite: replace an earlier export.

    Raises:
        CheckpointError: there is no intact checkpoint.
        ConversionError: the model has no counterpart, the target exists, the tokenizer is not that of the run, or the
            logits differ (the folder is kept).
        DataError: the tokenizer is missing or damaged.
    """
    model, reader = load_model(checkpoint)
    run, manifest = reader.run, reader.manifest
    precision = "bf16" if manifest.deepspeed.get("bf16", {}).get("enabled") else "fp32"
    facts = {
        "step": manifest.step,
        "tokens": manifest.samples * (run.training.seq_length or 0),
        "trained in": precision,
        **{name: f"{value:.4f}" for name, value in manifest.metrics.items()},
        **manifest.versions,
    }
    chosen = tokenizer_path(reader, tokenizer)
    if tokenizer is not None and run.data.tokenizer is not None:
        _require_size(Tokenizer.load(tokenizer), run.model.vocab_size)
    export = write_hf_folder(
        output, run.model, reader.full, reader.names, chosen, dtype, card=facts, overwrite=overwrite
    )
    with torch.no_grad():
        for parameter in model.parameters():  # compare what was stored, not what rounding made of it
            parameter.copy_(parameter.to(TORCH_DTYPES[dtype]))
    tokens_BS, trained_BPV = reader.probe()
    against_model = compare_logits(export.folder, tokens_BS, model_logits(model, tokens_BS, run.model.vocab_size))
    coarser = dtype if dtype != "float32" else ("bfloat16" if precision == "bf16" else "float32")
    against_training = compare_logits(
        export.folder,
        tokens_BS[:, : trained_BPV.shape[1]],
        trained_BPV,
        tolerance=RELATIVE_TOLERANCE[coarser] * max(1.0, float(trained_BPV.abs().max())),
    )
    checked = CheckedExport(export, against_model, against_training)
    for what, report in (("the checkpoint's model", against_model), ("the training ranks", against_training)):
        if not report.passed:
            raise ConversionError(f"{export.folder}: its logits differ from those of {what}: {report}; do not use it")
    return checked


def _require_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Training with a tokenizer has made sure that it has exactly the model's tokens."""
    if tokenizer.vocab_size != vocab_size:
        raise ConversionError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens but the model {vocab_size}; give the one "
            "that it was trained with"
        )
