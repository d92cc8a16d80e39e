"""Compare the logits of an exported model with those of the model it was made from."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagpt.convert.family import Family
from megagpt.convert.layerwise import LayerwiseTransformer
from megagpt.convert.tokenizer import export_tokenizer
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig
from megagpt.tokenization.tokenizer import Tokenizer

# Share of the largest reference logit. Rounding all weights and activations to 16 bits moves logits by percents.
RELATIVE_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

_SAMPLE = "The tensors of 1024 layers don't fit;\n\n\tgive them  more memory: \u00e9t\u00e9, \u4f60\u597d.\n"
"""Text that tokenizers cut differently."""


@dataclass(frozen=True)
class LogitsReport:
    """Differences over all positions and vocabulary entries."""

    max_difference: float
    mean_difference: float
    top1_agreement: float
    """Share of positions whose most likely token is the same."""
    tolerance: float
    """Largest `max_difference` that passes."""
    positions: int
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether the export computes the same as the model; not-a-number never passes."""
        return self.max_difference <= self.tolerance

    def require(self) -> None:
        """Raise unless the logits agree.

        Raises:
            ConversionError: the largest difference exceeds the tolerance.
        """
        if not self.passed:
            raise ConversionError(f"the exported model computes other logits: {self}; do not use this export")

    def __str__(self) -> str:
        return (
            f"largest difference {self.max_difference:.3g} (tolerance {self.tolerance:.3g}), mean "
            f"{self.mean_difference:.3g}, same top token at {self.top1_agreement:.2%} of {self.positions} positions, "
            f"{self.dtype}"
        )


def compare_logits(
    folder: str | Path,
    tokens_BS: Tensor,
    reference_logits_BSV: Tensor,
    tolerance: float | None = None,
) -> LogitsReport:
    """Have transformers compute an export's logits in fp32, weight by weight, and compare them.

    On the CPU, without network and without code of the folder.

    Args:
        folder: a Hugging Face folder.
        tokens_BS: token ids, batch x sequence.
        reference_logits_BSV: logits of the model before export, batch x sequence x vocabulary without padding.
        tolerance: largest absolute difference that passes; default: 1e-4 times the largest reference logit, or times 1
            if all are smaller.

    Raises:
        ConversionError: transformers is missing or cannot load the folder, a weight is missing or unknown, or the
            shapes do not fit together.
    """
    with quiet_transformers():
        return report_logits(LayerwiseTransformer(folder).logits(tokens_BS.cpu()), reference_logits_BSV, tolerance)


def report_logits(logits_BSV: Tensor, reference_BSV: Tensor, tolerance: float | None = None) -> LogitsReport:
    """Compare logits with their reference, both [B, S, vocabulary].

    Raises:
        ConversionError: the shapes differ, or there is nothing to compare.
    """
    if logits_BSV.shape != reference_BSV.shape or not reference_BSV.numel():
        raise ConversionError(
            f"logits have shape {list(logits_BSV.shape)} where the reference has {list(reference_BSV.shape)}; "
            "compare the same tokens, without vocabulary padding"
        )
    reference_BSV = reference_BSV.detach().cpu().float()
    if tolerance is None:
        tolerance = RELATIVE_TOLERANCE["float32"] * max(1.0, float(reference_BSV.abs().max()))
    largest, total, agreeing = torch.zeros((), dtype=torch.float64), 0.0, 0
    for logits_SV, reference_SV in zip(logits_BSV, reference_BSV, strict=True):  # no copy of the whole in fp64
        difference_SV = (logits_SV - reference_SV).abs()
        largest = torch.maximum(largest, difference_SV.max().double())  # Python's max() would drop not-a-number
        total += float(difference_SV.double().sum())
        agreeing += int((logits_SV.argmax(-1) == reference_SV.argmax(-1)).sum())
    positions = reference_BSV.shape[0] * reference_BSV.shape[1]
    return LogitsReport(
        max_difference=float(largest),
        mean_difference=total / reference_BSV.numel(),
        top1_agreement=agreeing / positions,
        tolerance=tolerance,
        positions=positions,
        dtype="float32",
    )


def require_same_tokens(family: Family, model: ModelConfig, tokenizer: str) -> None:
    """See that transformers, which has a tokenizer of its own for some families, reads text as the run did.

    Raises:
        ConversionError: it does not, or cannot load the tokenizer's files.
        DataError: the tokenizer is missing or damaged.
    """
    if not family.brings_tokenizer:
        return
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:  # the check of the logits says what to install
        return
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        exported = export_tokenizer(tokenizer, folder, model.vocab_size, model.max_position_embeddings)
        config = family.hf_config(model, exported.ids)
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokens = theirs(_SAMPLE, add_special_tokens=False)["input_ids"]
        except Exception as error:  # transformers has no common base
            raise ConversionError(f"tokenizer {tokenizer}: transformers cannot load it: {error}") from error
    if tokens != Tokenizer.load(tokenizer).encode(_SAMPLE):
        raise ConversionError(
            f"family {family.name}: transformers reads text with a tokenizer of this family, which gives other tokens "
            f"than {tokenizer}; leave the family out, and one that takes any tokenizer is chosen"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, warnings or log lines of transformers; its settings come back afterwards."""
    try:
        from transformers.utils import logging as hf_logging
    except ModuleNotFoundError:  # whoever needs it says what to install
        yield
        return
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
