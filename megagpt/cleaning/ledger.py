"""What happened to the documents, step by step: counted in each task, and summed up.

datatrove counts documents; here bytes are counted too, and some of the documents that each step dropped are kept. Which
ones is a matter of where a document stands in the inputs, not of who read it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from megagpt.cleaning.words import hash_text
from megagpt.data.files import write_whole


def num_bytes(text: str) -> int:
    """Size of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


@dataclass
class Tally:
    """A number of documents and their bytes of text."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, num_bytes: int) -> None:
        """Count more."""
        self.documents += documents
        self.bytes += num_bytes


@dataclass
class Sample:
    """A dropped document that is kept to look at."""

    rank: int
    """Its place among all documents, as a hash: the lowest are kept."""
    source: str
    """File and place in it."""
    text: str
    details: dict[str, Any]
    """What the step has found out about it."""


@dataclass
class StepRecord:
    """One step."""

    entered: Tally = field(default_factory=Tally)
    dropped: dict[str, Tally] = field(default_factory=dict)
    """By reason."""
    changed: int = 0
    """Documents whose text has been changed."""
    counts: dict[str, int] = field(default_factory=dict)
    """What else was counted, e.g. masked addresses."""
    seconds: float = 0.0
    """Processor time."""


class Ledger:
    """The records of all steps of one task, in order; or of several together.

    Args:
        steps: their names, without the first, "read".
        samples_per_reason: how many dropped documents to keep for each step and reason.
        sample_characters: how much of their text.
    """

    def __init__(self, steps: Iterable[str], samples_per_reason: int, sample_characters: int):
        self.steps = {name: StepRecord() for name in ("read", *steps)}
        self.kept = Tally()
        self.samples: dict[str, dict[str, list[Sample]]] = {}
        self._limits = samples_per_reason, sample_characters

    def drop(self, step: str, reason: str, document: Document) -> None:
        """Count a document as dropped, and keep it if it is one of the samples."""
        self.count_dropped(step, reason, 1, num_bytes(document.text))
        details = {key: value for key, value in document.metadata.items() if key not in ("record", "filter_reason")}
        rank = hash_text(document.id)
        self.offer(step, reason, Sample(rank, document.id, document.text, details))

    def count_dropped(self, step: str, reason: str, documents: int, num_bytes: int) -> None:
        """Count documents as dropped."""
        self.steps[step].dropped.setdefault(reason, Tally()).add(documents, num_bytes)

    def offer(self, step: str, reason: str, sample: Sample) -> None:
        """Keep a sample if its rank is low enough."""
        most, characters = self._limits
        found = self.samples.setdefault(step, {}).setdefault(reason, [])
        if len(found) < most or (found and sample.rank < found[-1].rank):
            sample.text = sample.text[:characters]
            found.append(sample)
            found.sort(key=lambda one: (one.rank, one.source))
            del found[most:]

    def merge(self, other: "Ledger") -> None:
        """Add the records of another task (of the same steps)."""
        for name, record in other.steps.items():
            ours = self.steps[name]
            ours.entered.add(record.entered.documents, record.entered.bytes)
            ours.changed += record.changed
            ours.seconds += record.seconds
            for reason, tally in record.dropped.items():
                self.count_dropped(name, reason, tally.documents, tally.bytes)
            for what, number in record.counts.items():
                ours.counts[what] = ours.counts.get(what, 0) + number
        self.kept.add(other.kept.documents, other.kept.bytes)
        for step, reasons in other.samples.items():
            for reason, samples in reasons.items():
                for sample in samples:
                    self.offer(step, reason, sample)

    def save(self, path: Path) -> None:
        """Write all of it as JSON."""
        content = {
            "steps": {name: asdict(record) for name, record in self.steps.items()},
            "kept": asdict(self.kept),
            "samples": {
                step: {reason: [asdict(sample) for sample in samples] for reason, samples in reasons.items()}
                for step, reasons in self.samples.items()
            },
            "limits": self._limits,
        }
        write_whole(path, json.dumps(content).encode())

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Read what `save` has written."""
        content = json.loads(path.read_bytes())
        ledger = cls([], *content["limits"])
        ledger.steps = {name: _record(record) for name, record in content["steps"].items()}
        ledger.kept = Tally(**content["kept"])
        ledger.samples = {
            step: {reason: [Sample(**sample) for sample in samples] for reason, samples in reasons.items()}
            for step, reasons in content["samples"].items()
        }
        return ledger


def _record(content: dict[str, Any]) -> StepRecord:
    entered = Tally(**content.pop("entered"))
    dropped = {reason: Tally(**tally) for reason, tally in content.pop("dropped").items()}
    return StepRecord(entered, dropped, **content)


class Meter(PipelineStep):
    """Counts what enters a step; stands before it."""

    type = "megagpt"

    def __init__(self, ledger: Ledger, step: str | None):
        """Count for a step, or (None) what comes out of the last one."""
        self.name = f"into {step}" if step else "kept"
        super().__init__()
        self._tally = ledger.steps[step].entered if step else ledger.kept

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        tally = self._tally
        for document in data:
            tally.add(1, num_bytes(document.text))
            yield document


class Dropped:
    """Receives what a step of datatrove drops (its `exclusion_writer`).

    Args:
        ledger: where to count it.
        step: name of the step.
        names: what the step's reasons are called here: as the keys of the recipe.
    """

    def __init__(self, ledger: Ledger, step: str, names: Mapping[str, str] | None = None):
        self._ledger, self._step, self._names = ledger, step, names or {}

    def __enter__(self) -> "Dropped":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        """Count a document."""
        reason = document.metadata["filter_reason"]
        self._ledger.drop(self._step, self._names.get(reason, reason), document)
