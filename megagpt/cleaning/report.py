"""OUTPUT.report: what a cleaned corpus was made from, what was left out and why, and samples of it."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.data.files import write_whole
from megagpt.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One file of the output."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Report:
    """Origin and content of a cleaned corpus."""

    format: int
    megagpt_version: str
    datatrove_version: str
    identity: dict[str, Any]
    """All settings: the recipe's, the key of the text and the like."""
    inputs: tuple[dict[str, Any], ...]
    """Path, size and time of change of each file."""
    steps: dict[str, dict[str, Any]]
    """For each step: documents and bytes that entered, what was dropped by reason, documents changed, other counts."""
    read: dict[str, int]
    """Documents and bytes of text in the inputs."""
    kept: dict[str, int]
    """Documents and bytes of text in the output."""
    shards: tuple[Shard, ...]


def report_folder(output: str | Path) -> Path:
    """Folder of the report that belongs to an output."""
    return Path(f"{output}.report")


def write_report(folder: Path, report: Report, samples: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write report.json, report.txt and dropped/STEP.REASON.jsonl.

    Raises:
        DataError: a file cannot be written.
    """
    for step, reasons in samples.items():
        for reason, found in reasons.items():
            name = f"{step}.{re.sub('[^A-Za-z0-9]+', '-', reason)}.jsonl"
            lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in found)
            write_whole(folder / "dropped" / name, "".join(lines).encode())
    write_whole(folder / "report.txt", (table(report) + "\n").encode())
    write_whole(folder / "report.json", (json.dumps(asdict(report), indent=2) + "\n").encode())


def read_report(output: str | Path) -> Report | None:
    """The report of an output; None if there is none.

    Raises:
        DataError: it is damaged or of another version.
    """
    path = report_folder(output) / "report.json"
    try:
        content = json.loads(path.read_bytes())
        content["inputs"] = tuple(content["inputs"])
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        report = Report(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a readable report ({error}); choose another --output") from None
    if report.format != FORMAT:
        raise DataError(f"{path} is a report of format {report.format}, not {FORMAT}; choose another --output")
    return report


def table(report: Report) -> str:
    """The report as a table: a line for each step that dropped or changed something, and for each reason."""
    whole = report.read["documents"]
    rows: list[Sequence[str]] = [("step", "", "documents", "of all", "MB of text")]
    rows.append(("read", "", *_amounts(report.read, whole)))
    for name, step in report.steps.items():
        label = name.replace("_", " ")
        for reason, dropped in sorted(step["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0])):
            rows.append((label, reason, *_amounts(dropped, whole, "-")))
            label = ""
        if step["changed"]:
            rows.append((label, "changed", f"{step['changed']:,}", _share(step["changed"], whole), ""))
            label = ""
        for what, number in sorted(step["counts"].items()):
            rows.append((label, what, f"{number:,}", "", ""))
            label = ""
        if label and name != "read":
            rows.append((label, "nothing found", "0", "", ""))
    rows.append(("kept", "", *_amounts(report.kept, whole)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _amounts(tally: dict[str, int], whole: int, sign: str = "") -> tuple[str, str, str]:
    documents, size = tally["documents"], tally["bytes"]
    return f"{sign}{documents:,}", _share(documents, whole), f"{sign}{size / 1e6:,.2f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else ""
