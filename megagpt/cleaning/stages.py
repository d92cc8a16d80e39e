"""A recipe and inputs as datatrove pipelines, each with a number of tasks that run side by side.

clean      inputs -> steps -> kept documents, and their signatures
equal      signatures of whole texts -> pairs
alike      MinHash signatures -> pairs, a task for each bucket
groups     pairs -> duplicates of each task
shards     kept documents -> the output's files
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megagpt.cleaning import duplicates, filters, texts
from megagpt.cleaning.ledger import Ledger, Meter
from megagpt.cleaning.recipe import Recipe, unflatten
from megagpt.cleaning.repetition import RepetitionFilter
from megagpt.cleaning.shards import KeptWriter, Reader, ShardWriter
from megagpt.data.work import Plan, Unit

_LINES = "line-filter-"


@dataclass(frozen=True)
class Stage:
    """One pipeline.

    Attributes:
        name: of its folder.
        title: for the progress.
        pipeline: steps of datatrove.
        sizes: of its tasks, for the progress.
    """

    name: str
    title: str
    pipeline: Sequence[PipelineStep]
    sizes: Sequence[int]


class Places:
    """Where things are in the work folder."""

    def __init__(self, work: Path):
        """Name them; none need exist."""
        self.work = work
        self.kept = work / "kept"
        self.shards = work / "shards"
        self.evaluation = work / "evaluation"
        self.equal_signatures, self.equal_pairs = work / "equal-signatures", work / "equal-pairs"
        self.alike_signatures, self.alike_pairs = work / "alike-signatures", work / "alike-pairs"
        self.groups = work / "groups"

    def ledger(self, rank: int) -> Path:
        """Counts of a task of the first stage; `WorkFolder` takes it for the mark of a finished unit."""
        return self.work / f"{rank:08d}.json"

    def log(self, stage: str) -> Path:
        """datatrove's folder of a stage: completed tasks, logs, statistics."""
        return self.work / "stages" / stage


class SaveLedger(PipelineStep):
    """Ends a pipeline: writes down what has been counted."""

    type, name = "megagpt", "count"

    def __init__(self, ledger: Ledger, steps: dict[str, BaseFilter], places: Places):
        super().__init__()
        self._ledger, self._steps, self._places = ledger, steps, places

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Use up the documents and save."""
        for _ in data or ():
            pass
        for name, step in self._steps.items():
            record = self._ledger.steps[name]
            record.seconds = step.stats.time_stats.total
            for label, found in step.stats.stats.items():
                if label.startswith(_LINES):  # of C4's filter
                    record.counts[f"lines removed: {label.removeprefix(_LINES).replace('_', ' ')}"] = int(found.total)
        self._ledger.save(self._places.ledger(rank))


def build_stages(plan: Plan, work: Path, unit_sizes: Sequence[int]) -> list[Stage]:
    """The pipelines of a plan.

    Args:
        plan: inputs, units, and all options (see `megagpt.cleaning.job`) in its identity.
        work: folder of unfinished work.
        unit_sizes: bytes of each unit.
    """
    recipe, places, total = unflatten(plan.identity), Places(work), sum(unit_sizes)
    stages = [Stage("clean", "cleaning", _cleaning(recipe, plan, places), unit_sizes)]
    exact = near = None
    if recipe.exact_duplicates is not None:
        exact = places.equal_pairs
        step = duplicates.pairs_step(places.equal_signatures, exact, duplicates.EXACT)
        stages.append(Stage("equal", "comparing", [step], [total]))
    if recipe.near_duplicates is not None:
        near = places.alike_pairs
        step = duplicates.pairs_step(places.alike_signatures, near, duplicates.near_config(recipe.near_duplicates))
        buckets = recipe.near_duplicates.buckets
        stages.append(Stage("alike", "comparing", [step], [total // buckets] * buckets))
    if exact or near:
        groups = duplicates.Clusters(exact, near, places.groups)
        stages.append(Stage("groups", "grouping", [groups], [total]))
    options: dict[str, Any] = {key: plan.identity[key] for key in ("text_key", "compression")}
    options |= recipe.samples.model_dump()
    writer = ShardWriter(places.kept, places.groups, places.shards, plan.inputs, options)
    stages.append(Stage("shards", "writing", [writer], unit_sizes))
    return stages


def _cleaning(recipe: Recipe, plan: Plan, places: Places) -> list[PipelineStep]:
    made: dict[str, Any] = {
        "html": texts.HtmlToText,
        "unicode": texts.MendUnicode,
        "whitespace": texts.TidyWhitespace,
        "length": filters.LengthFilter,
        "language": filters.LanguageFilter,
        "quality": filters.quality,
        "repetition": RepetitionFilter,
        "c4": filters.C4Filter,
        "personal_data": texts.MaskPersonalData,
        "evaluation": lambda options, ledger: filters.evaluation(options, ledger, places.evaluation),
    }
    names = [name for name in made if getattr(recipe, name) is not None]
    ledger = Ledger(names, recipe.samples.per_reason, recipe.samples.max_characters)
    steps: dict[str, BaseFilter] = {name: made[name](getattr(recipe, name), ledger) for name in names}
    text_key, on_bad_line = plan.identity["text_key"], plan.identity["on_bad_line"]
    units: list[Unit] = plan.units
    pipeline: list[PipelineStep] = [Reader(plan.inputs, units, text_key, on_bad_line, ledger)]
    for name, step in steps.items():
        pipeline += [Meter(ledger, name), step]
    pipeline += [Meter(ledger, None), KeptWriter(places.kept, text_key, plan.identity["compression"])]
    if recipe.exact_duplicates is not None:
        pipeline.append(duplicates.ExactSignature(places.equal_signatures))
    if recipe.near_duplicates is not None:
        pipeline.append(duplicates.NearSignature(places.alike_signatures, recipe.near_duplicates))
    return [*pipeline, SaveLedger(ledger, steps, places)]
