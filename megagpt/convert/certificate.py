"""What the check of an export has found, for people and for programs."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import megagpt
from megagpt.convert.verify import LogitsReport

CERTIFICATE = "certificate.json"
_PACKAGES = ("torch", "transformers", "safetensors", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class Certificate:
    """Logits of the exported folder, computed by transformers, against those of its source."""

    comparisons: dict[str, LogitsReport]
    """What was compared with -> what was found."""
    source: dict[str, Any] = field(default_factory=dict)
    """What the export was made from: names, numbers and hashes."""
    first_difference: str | None = None
    """Where the first difference arises; None if all comparisons passed."""

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return all(report.passed for report in self.comparisons.values())

    @property
    def failure(self) -> str:
        """The first comparison that failed, as a sentence."""
        what, report = next((what, report) for what, report in self.comparisons.items() if not report.passed)
        where = f"; the first difference is in {self.first_difference}" if self.first_difference else ""
        return f"its logits differ from those of {what}: {report}{where}; do not use it"

    def content(self, hashes: dict[str, str]) -> dict[str, Any]:
        """The content of certificate.json.

        Args:
            hashes: SHA-256 of the folder's files by name.
        """
        return {
            "passed": self.passed,
            "largest_logit_difference": max(report.max_difference for report in self.comparisons.values()),
            "comparisons": {
                what: {
                    "largest_difference": report.max_difference,
                    "mean_difference": report.mean_difference,
                    "tolerance": report.tolerance,
                    "same_top_token": report.top1_agreement,
                    "positions": report.positions,
                    "computed_in": report.dtype,
                    "passed": report.passed,
                }
                for what, report in self.comparisons.items()
            },
            "first_difference": self.first_difference,
            "source": self.source,
            "sha256": hashes,
            "versions": _versions(),
        }

    def rows(self) -> dict[str, str]:
        """Label -> value, for the model card."""
        return {f"logits against {what}": str(report) for what, report in self.comparisons.items()} | {
            "certificate": "passed" if self.passed else f"FAILED: {self.failure}"
        }


def _versions() -> dict[str, str]:
    found = {"megagpt": megagpt.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
