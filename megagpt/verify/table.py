"""The table of verified layouts: measured row by row against one process, and written as a document."""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.parallel.local_ranks import RankFailedError, run_ranks
from megagpt.plan import Plan
from megagpt.verify.layout import environments_of_ranks, import_libraries
from megagpt.verify.rows import MAX_RANKS, Row

if TYPE_CHECKING:
    from megagpt.verify.measure import RankMeasurement, Reference
    from megagpt.verify.verdicts import Verdict

Key = tuple[str, str, str, str, str, str]
"""Topic, model, optimizer, layout, engine and options."""
ROWS_PER_PROCESS = 8
"""Starting a set of processes takes longer than a row; but one that fails takes its companions along."""


@dataclass(frozen=True)
class MeasuredRow:
    """A row and what came of it."""

    row: Row
    verdicts: "tuple[Verdict, ...]"
    """Empty if a rank failed."""
    fall: float
    """By how much the loss of one process falls, in nats per token: without learning the comparison says little."""
    failure: str = ""
    """Last line of a rank's error."""

    @property
    def wrong(self) -> list[str]:
        """What is not as in one process; [] for a good row."""
        if self.failure:
            return [self.failure]
        learns = [] if self.fall > 0.1 else [f"loss falls by {self.fall:.2f} only"]
        return [*(verdict.quantity for verdict in self.verdicts if not verdict.passed), *learns]


def measure_rows(rows: Sequence[Row], told: Callable[[str], None] = print, on_gpus: bool = False) -> list[MeasuredRow]:
    """Run rows on processes of this host and compare each with one process.

    Args:
        rows: what to run.
        told: takes a line of progress per row.
        on_gpus: as for `verify_layout`.

    Raises:
        LaunchError: there is no GPU.
    """
    places = environments_of_ranks(MAX_RANKS) if on_gpus else None
    import_libraries()
    plans = {row.key: row.plan() for row in rows}
    assert len(plans) == len(rows), "two rows say the same"
    references = _references(list(plans.values()))
    found: dict[str, MeasuredRow] = {}
    for batch in _batches(rows, plans):
        started = time.monotonic()
        for row, ranks in zip(batch, _run(batch, plans, places), strict=True):
            found[row.key] = _judged(row, plans[row.key], ranks, references[_reference_key(plans[row.key])])
            told(_progress(found[row.key], len(found), len(rows), (time.monotonic() - started) / len(batch)))
    return [found[row.key] for row in rows]


def _references(plans: Iterable[Plan]) -> "dict[str, Reference]":
    """What one process does, by what the plans have in common; the cores share the work."""
    from megagpt.verify.measure import measure_references

    distinct = {_reference_key(plan): plan for plan in plans}
    keys = list(distinct)
    workers = min(len(keys), os.cpu_count() or 1)

    def measure() -> "dict[str, Reference]":
        mine = keys[int(os.environ["RANK"]) :: workers]
        return dict(zip(mine, measure_references([distinct[key] for key in mine]), strict=True))

    return {key: value for part in run_ranks(measure, workers, timeout=1800) for key, value in part.items()}


def _reference_key(plan: Plan) -> str:
    """Equal for plans with the same model, samples, updates and precision."""
    run = plan.run
    same = [run.model, run.optimizer, run.training.steps, run.training.seed, run.training.seq_length]
    values = [value.model_dump(mode="json") if hasattr(value, "model_dump") else value for value in same]
    batch = [plan.global_batch_size, plan.microbatch_size, plan.gradient_clipping, plan.precision]
    return json.dumps([*values, *batch])


def _batches(rows: Sequence[Row], plans: dict[str, Plan]) -> Iterator[list[Row]]:
    """Rows that one set of processes can run after each other."""
    sizes = sorted({plans[row.key].world_size for row in rows})
    for size in sizes:
        members = [row for row in rows if plans[row.key].world_size == size]
        for start in range(0, len(members), ROWS_PER_PROCESS):
            yield members[start : start + ROWS_PER_PROCESS]


def _run(
    batch: Sequence[Row], plans: dict[str, Plan], places: list[dict[str, str]] | None
) -> "list[list[RankMeasurement] | str]":
    """Each row's measurements by rank, or why there are none."""
    from megagpt.verify.measure import measure_runs

    chosen = [plans[row.key] for row in batch]
    try:
        by_rank = run_ranks(measure_runs, chosen[0].world_size, chosen, timeout=120.0 * len(batch), environments=places)
    except RankFailedError as error:
        failure = str(error)
    else:
        return [list(ranks) for ranks in zip(*by_rank, strict=True)]
    if len(batch) > 1:  # one by one, so that only the row that fails has no result
        return [result for row in batch for result in _run([row], plans, places)]
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", failure, re.MULTILINE)
    causes = [line for line in errors if "gloo" not in line]  # others lose the rank that failed
    return [[*causes, *errors, failure.splitlines()[0]][0]]


def _judged(row: Row, plan: Plan, ranks: "list[RankMeasurement] | str", reference: "Reference") -> MeasuredRow:
    from megagpt.verify.verdicts import judge

    fall = reference.losses[0] - reference.losses[-1]
    if isinstance(ranks, str):
        return MeasuredRow(row, (), fall, ranks)
    return MeasuredRow(row, tuple(judge(plan, ranks, reference)), fall)


def _progress(measured: MeasuredRow, number: int, total: int, seconds: float) -> str:
    word = f"MISSED ({', '.join(measured.wrong)})" if measured.wrong else "ok"
    return f"{number}/{total} {measured.row.key}: {word}, {seconds:.1f} s"


INTRODUCTION = """\
# Layouts against one process

Written by `{command}`; do not edit. {place}

Each row trains a small model for 20 steps on real {backend} processes with the engine that a cluster job uses, and
compares every rank with one process that runs the same model in a plain torch loop on the CPU, without DeepSpeed.
Global batch 8 in micro-batches of 2, 32 tokens per sample, gradients clipped at norm 0.5. Adam hides errors in the
scale of gradients, so most rows use SGD with a rate of 0.5.

- **loss**: largest difference of a step's loss on any rank, in nats per token; **norm**: largest relative difference of
  a step's gradient norm; **weights**: 2-norm of the difference of all fp32 master weights after 20 steps, relative to
  that of what the updates changed. Each stands before its bound.
- **ok** says more: copies of weights on several ranks are equal bit for bit (so are both copies of a tied embedding),
  and the bytes of each kind of collective are those that the plan foretells.
- **Bounds** follow from what rounding does to one process: {noise:g} times the largest distance of a single process in
  the row's precision from one in fp64 (of fp32 rows) or fp32 (of bf16 and fp16 rows), over runs that cut the global
  batch into micro-batches of 1, 2 and 8. That is the same mathematics, rounded otherwise, as a layout is too. Models
  with experts, whose load-balancing loss is taken per micro-batch, start instead from weights that differ by an eighth
  of what rounding changes: routing makes of that what it makes of rounding.
- **fp32's bounds** are not less than 1e-5 for loss and norm, and for weights 1e-4 under SGD and 1e-2 under Adam, which
  divides by the size of a gradient and so moves weights whose gradients nearly vanish. Few models need more: those
  whose training amplifies rounding, where fp32 itself does not give the curve to 1e-5.
- **falls**: by how much the loss falls in one process; a row whose model does not learn counts as missed.

Verdict: {verdict}. Versions: {versions}.
"""
PLACES = {
    False: {
        "command": "python tools/verify_table.py",
        "place": "It needs no GPU and some 45 minutes on two CPU cores.",
        "backend": "gloo",
    },
    True: {
        "command": "python tools/verify_table.py --gpus",
        "place": "Ranks share GPUs where there are fewer of them: NCCL is told that each rank has a host of its own.",
        "backend": "NCCL",
    },
}
GOOD = "| ok |"
COLUMNS = ("model", "optimizer", "layout", "engine", "options", "loss", "norm", "weights", "falls", "verdict")


def render(lines: dict[Key, str], on_gpus: bool = False) -> str:
    """The document.

    Args:
        lines: of all rows, in their order.
        on_gpus: where the ranks computed.
    """
    from megagpt.verify.verdicts import NOISE

    good = sum(line.endswith(GOOD) for line in lines.values())
    verdict = f"{good} of {len(lines)} rows are within their bounds"
    parts = [INTRODUCTION.format(noise=NOISE, verdict=verdict, versions=_versions(), **PLACES[on_gpus])]
    for topic in dict.fromkeys(topic for topic, *_ in lines):
        head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        parts.append("\n".join([f"## {topic}", "", *head, *(lines[key] for key in lines if key[0] == topic), ""]))
    return "\n".join(parts)


def _versions() -> str:
    names = ("torch", "deepspeed", "megatron-core")
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in names)


def key_of(row: Row) -> Key:
    """What names a row in the document."""
    return row.topic, row.model, row.optimizer, row.ranks, row.engine, row.options


def line_of(one: MeasuredRow) -> str:
    """A row in the document."""
    return f"| {' | '.join(_cells(one))} |"


def _cells(one: MeasuredRow) -> list[str]:
    row = one.row
    figures = {verdict.quantity: f"{verdict.difference:.1e} / {verdict.bound:.0e}" for verdict in one.verdicts}
    numbers = [figures.get(quantity, "") for quantity in ("loss", "gradient norm", "weights")]
    word = f"**missed**: {', '.join(one.wrong)}" if one.wrong else "ok"
    return [row.model, row.optimizer, row.ranks, row.engine, row.options, *numbers, f"{one.fall:.2f}", word]


def listed_rows(document: str) -> dict[Key, str]:
    """The lines of a document's rows."""
    topic, found = "", dict[Key, str]()
    for line in document.splitlines():
        if line.startswith("## "):
            topic = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == len(COLUMNS) and cells[0] not in ("---", COLUMNS[0]):
            model, optimizer, ranks, engine, options = cells[:5]
            found[topic, model, optimizer, ranks, engine, options] = line
    return found


def write_table(rows: Sequence[Row], path: Path, only_new: bool = False, on_gpus: bool = False) -> bool:
    """Measure rows and write the document; True if all are within their bounds.

    Args:
        rows: of the document.
        path: the document.
        only_new: keep its lines of good rows, if they were written with the same versions of the libraries.
        on_gpus: as for `verify_layout`.

    Raises:
        LaunchError: there is no GPU.
    """
    known = path.read_text(encoding="utf-8") if only_new and path.exists() else ""
    lines = {key: line for key, line in listed_rows(known).items() if line.endswith(GOOD) and _versions() in known}
    new = [row for row in rows if key_of(row) not in lines]
    lines |= {key_of(one.row): line_of(one) for one in (measure_rows(new, on_gpus=on_gpus) if new else ())}
    text = render({key_of(row): lines[key_of(row)] for row in rows}, on_gpus)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    good = sum(line.endswith(GOOD) for line in listed_rows(text).values())
    print(f"{path}: {good} of {len(rows)} rows are within their bounds")
    return good == len(rows)
