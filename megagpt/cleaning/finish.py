"""The end of a job: counts of all tasks put together, the report written, the output given its name."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megagpt
from megagpt.cleaning.ledger import Ledger, StepRecord, Tally
from megagpt.cleaning.report import FORMAT, Report, Shard, report_folder, write_report
from megagpt.cleaning.shards import SUFFIXES, kept_document, ledger_file
from megagpt.cleaning.stages import Places
from megagpt.data.files import publish, sha256_of_file
from megagpt.data.work import Plan
from megagpt.errors import DataError


def finish(plan: Plan, work: Path) -> Report:
    """Put the output of finished stages together and remove the work folder.

    Raises:
        DataError: a task is missing, or no document is left; then only the report is written.
        OSError: the disk is full or gone.
    """
    places, output = Places(work), Path(str(work).removesuffix(".work"))
    ledger = _all_counts(plan, places)
    shards = [
        Shard(path.name, path.stat().st_size, sha256_of_file(path))
        for path in sorted(places.shards.glob(f"*{SUFFIXES[plan.identity['compression']]}"))
    ]
    report = Report(
        format=FORMAT,
        megagpt_version=megagpt.__version__,
        datatrove_version=version("datatrove"),
        identity=plan.identity,
        inputs=tuple(asdict(source) for source in plan.inputs),
        steps={name: asdict(step) for name, step in ledger.steps.items()},
        read=asdict(ledger.steps["read"].entered),
        kept=asdict(ledger.kept),
        shards=tuple(shards),
    )
    new_report = work / "report"
    shutil.rmtree(new_report, ignore_errors=True)
    write_report(new_report, report, _samples(ledger, plan, places))
    if not shards:
        _replace(report_folder(output), new_report, work / "old-report")
        shutil.rmtree(work)
        raise DataError(
            f"no document is left of {report.read['documents']:,}; {report_folder(output)} says why: change the recipe"
        )
    _replace(report_folder(output), new_report, work / "old-report")
    _replace(output, places.shards, work / "old-output")
    shutil.rmtree(work, ignore_errors=True)
    return report


def _replace(final: Path, new: Path, old: Path) -> None:
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    publish(new, final)


def _all_counts(plan: Plan, places: Places) -> Ledger:
    """The ledgers of all tasks, with the steps that leave out duplicates behind the others."""
    total: Ledger | None = None
    for rank in range(len(plan.units)):
        try:
            found = Ledger.load(places.ledger(rank))
            duplicates = Ledger.load(ledger_file(places.work, rank))
        except FileNotFoundError as error:
            raise DataError(f"task {rank} is not done ({error.filename} is missing); start again to go on") from None
        for name in ("exact_duplicates", "near_duplicates"):
            if plan.identity[name]:
                found.steps[name] = StepRecord(Tally(found.kept.documents, found.kept.bytes))
                for tally in duplicates.steps.get(name, StepRecord()).dropped.values():
                    found.kept.add(-tally.documents, -tally.bytes)
        duplicates.steps = {name: StepRecord(dropped=step.dropped) for name, step in duplicates.steps.items()}
        duplicates.kept = Tally()
        found.merge(duplicates)
        if total is None:
            total = found
        else:
            total.merge(found)
    assert total is not None, "there are inputs"
    return total


def _samples(ledger: Ledger, plan: Plan, places: Places) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Samples as they are written; duplicates stand beside the document that stays."""
    most = plan.identity["samples.max_characters"]

    def shown(sample: Any) -> dict[str, Any]:
        details = dict(sample.details)
        details.pop("source", None)
        if (first := details.pop("first", None)) is not None:
            task, number = first
            source, record = kept_document(places.kept, task, number, plan.inputs, plan.identity["compression"])
            details |= {"first_source": source, "first_text": record[plan.identity["text_key"]][:most]}
        return {"source": sample.source, "text": sample.text, **details}

    return {
        step: {reason: [shown(sample) for sample in found] for reason, found in reasons.items()}
        for step, reasons in ledger.samples.items()
    }


def check_shards(output: Path, shards: Sequence[Shard]) -> str:
    """What is wrong with the files of an output, by their sizes; "" if nothing is."""
    for shard in shards:
        path = output / shard.name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != shard.bytes:
            return f"{path} has {size} bytes instead of {shard.bytes}"
    return ""
