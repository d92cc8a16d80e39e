"""Compare the logits of an exported model with those of the model it was made from."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.convert.family import Dtype
from megagpt.convert.safetensors_stream import TORCH_DTYPES
from megagpt.errors import ConversionError

# Share of the largest reference logit. Rounding all weights and activations to 16 bits moves logits by percents.
RELATIVE_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


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
    dtype: Dtype = "float32",
    tolerance: float | None = None,
) -> LogitsReport:
    """Load an export with transformers, on the CPU and without network, and compare its logits.

    Args:
        folder: a Hugging Face folder.
        tokens_BS: token ids, batch x sequence.
        reference_logits_BSV: logits of the model before export, batch x sequence x vocabulary without padding.
        dtype: type in which the export is loaded and computes.
        tolerance: largest absolute difference that passes; default: `RELATIVE_TOLERANCE[dtype]` times the largest
            reference logit, or times 1 if all are smaller.

    Raises:
        ConversionError: transformers is missing or cannot load the folder, a weight is missing or unknown, or the
            shapes do not fit together.
    """
    if tokens_BS.dim() != 2 or reference_logits_BSV.shape[:2] != tokens_BS.shape or not tokens_BS.numel():
        raise ConversionError(
            f"tokens have shape {list(tokens_BS.shape)} and reference logits {list(reference_logits_BSV.shape)}; "
            "they must be batch x sequence and batch x sequence x vocabulary, not empty"
        )
    with _quiet_transformers():
        hf_model = _load(folder, dtype)
        largest, total, agreeing = 0.0, 0.0, 0
        for tokens_S, reference_SV in zip(tokens_BS.cpu(), reference_logits_BSV, strict=True):  # one sample in memory
            with torch.inference_mode():
                logits_SV = hf_model(tokens_S[None], use_cache=False).logits[0].float()
            reference_SV = reference_SV.detach().cpu().float()
            if logits_SV.shape != reference_SV.shape:
                raise ConversionError(
                    f"{folder}: logits have {logits_SV.shape[-1]} entries where the reference has "
                    f"{reference_SV.shape[-1]}; compare without vocabulary padding"
                )
            difference_SV = (logits_SV - reference_SV).abs()
            # max() of Python drops not-a-number, torch.maximum keeps it
            largest = float(torch.maximum(torch.tensor(largest, dtype=torch.float64), difference_SV.max().double()))
            total += float(difference_SV.double().sum())
            agreeing += int((logits_SV.argmax(-1) == reference_SV.argmax(-1)).sum())
    if tolerance is None:
        tolerance = RELATIVE_TOLERANCE[dtype] * max(1.0, float(reference_logits_BSV.abs().max()))
    return LogitsReport(
        max_difference=largest,
        mean_difference=total / reference_logits_BSV.numel(),
        top1_agreement=agreeing / tokens_BS.numel(),
        tolerance=tolerance,
        positions=tokens_BS.numel(),
        dtype=dtype,
    )


def _load(folder: str | Path, dtype: Dtype) -> Any:
    if not (Path(folder) / "config.json").is_file():
        raise ConversionError(f"{folder}: no config.json; give the folder of an export")
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError:
        raise ConversionError("checking an export needs transformers; run pip install 'megagpt[hf]'") from None
    try:
        hf_model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=TORCH_DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and torch have no common base
        raise ConversionError(f"{folder}: transformers cannot load it: {error}") from error
    problems = {kind: sorted(map(str, found)) for kind, found in loading.items() if found}
    if problems:
        raise ConversionError(f"{folder}: weights do not match the config: {problems}; export it again")
    return hf_model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars, warnings or log lines of transformers; its settings come back afterwards."""
    try:
        from transformers.utils import logging as hf_logging
    except ModuleNotFoundError:  # _load says what to install
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
