"""Look into checkpoints: list and verify them, show their parameters, compare two."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.manifest import MANIFEST
from megagpt.checkpoint.reader import CheckpointReader, list_checkpoints
from megagpt.checkpoint.restore import DAMAGED_PREFIX
from megagpt.checkpoint.retention import BEST, LATEST, PINNED
from megagpt.errors import CheckpointError
from megagpt.storage import Location
from megagpt.storage.steps import STEP_PREFIX, is_step_name

MAX_SHOWN = 20


@dataclass(frozen=True)
class Summary:
    """One checkpoint of a list."""

    folder: Location
    reader: CheckpointReader | None
    problems: tuple[str, ...]
    """What is wrong with it; empty if nothing was found."""
    marks: tuple[str, ...]
    """`latest`, `best`, `pinned`."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor of one checkpoint is from the same one of another."""

    name: str
    largest: float
    """Largest absolute difference of two elements; infinite if one is not a number."""
    relative: float
    """Norm of the difference over the norm of the first."""


def summarise(path: Location, with_hash: bool) -> list[Summary]:
    """Summaries of a checkpoint, or of all in a directory, newest first; damaged ones that were set aside come last.

    Args:
        path: a checkpoint, or a run's directory.
        with_hash: read everything and compare hashes; else look at manifests, sizes and headers only.

    Raises:
        CheckpointError: there is none.
    """
    if isinstance(path, Path) and path.name in ("", ".."):  # the working directory, whose name says which one it is
        path = path.resolve()
    if is_step_name(path.name) or (path / MANIFEST).exists():
        folders = [path]
    else:
        folders = list_checkpoints(path)
        if path.is_dir():
            aside = f"{DAMAGED_PREFIX}{STEP_PREFIX}"
            folders += sorted((other for other in path.iterdir() if other.name.startswith(aside)), key=str)
    if not folders or not path.is_dir():
        raise CheckpointError(f"{path}: no checkpoint here; give a checkpoint, or the directory of a run's checkpoints")
    return [_summary(folder, with_hash) for folder in folders]


def _summary(folder: Location, with_hash: bool) -> Summary:
    marks = [name for name in (LATEST, BEST) if _points_at(folder.parent / name, folder)]
    if (folder / PINNED).exists():
        marks.append(PINNED)
    try:
        reader = CheckpointReader(folder)
        return Summary(folder, reader, tuple(reader.problems(with_hash=with_hash)), tuple(marks))
    except CheckpointError as error:
        return Summary(folder, None, (str(error),), tuple(marks))


def _points_at(pointer: Location, folder: Location) -> bool:
    try:
        return pointer.read_text().strip() == folder.name
    except (OSError, ValueError):
        return False


def summary_table(summaries: list[Summary]) -> str:
    """One line per checkpoint, and one per problem."""
    rows: list[tuple[str, ...]] = [
        ("checkpoint", "samples", "train loss", "val. loss", "layout", "precision", "GB", "")
    ]
    for summary in summaries:
        if summary.reader is None:
            rows.append((summary.folder.name, "", "", "", "", "", "", " ".join(("damaged", *summary.marks))))
            continue
        manifest = summary.reader.manifest
        losses = [manifest.metrics.get("train_loss"), manifest.metrics.get("validation_loss")]
        shown = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        if shown[1] and not manifest.evaluated:
            shown[1] = f"({shown[1]})"  # of an earlier step
        gigabytes = sum(file.bytes for file in manifest.files.values()) / 1e9
        state = (("damaged",) if summary.problems else ()) + summary.marks
        layout = layout_of(summary.reader)
        rows.append(
            (
                summary.folder.name,
                f"{manifest.samples:,}",
                *shown,
                layout,
                manifest.precision,
                f"{gigabytes:.3f}",
                " ".join(state),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(problem for summary in summaries for problem in summary.problems)])


def layout_of(reader: CheckpointReader) -> str:
    """The layout that wrote a checkpoint, such as `TP 2 x PP 2 x DP 1`."""
    manifest, parallel = reader.manifest, reader.run.parallel
    context = f"CP {parallel.context_parallel_size} x " if parallel.context_parallel_size > 1 else ""
    data = manifest.world_size // parallel.ranks_per_replica
    return f"TP {manifest.tensor_parallel_size} x {context}PP {manifest.pipeline_parallel_size} x DP {data}"


def details(reader: CheckpointReader) -> str:
    """What else a checkpoint's manifest says."""
    manifest = reader.manifest
    numel = sum(torch.Size(parameter.shape).numel() for parameter in manifest.parameters.values())
    facts = {
        "step": f"{manifest.step:,} ({manifest.updates_done:,} updates)",
        "parameters": f"{numel:,} in {len(manifest.parameters)} tensors",
        "moments": ", ".join(manifest.moments) or "none",
        "written by": ", ".join(f"{name} {version}" for name, version in _versions(reader).items()),
        **{name.replace("_", " "): f"{value:.6g}" for name, value in manifest.metrics.items()},
        **{f"{name} fingerprint": value for name, value in manifest.fingerprints.items()},
    }
    if manifest.loss_scale is not None:
        facts["loss scale"] = f"{manifest.loss_scale.scale:g}"
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _versions(reader: CheckpointReader) -> dict[str, str]:
    return {"megagpt": reader.manifest.megagpt, **reader.manifest.versions}


def parameter_table(reader: CheckpointReader) -> str:
    """Name, shape, norm and largest element of each parameter, and the norms of its moments.

    Raises:
        CheckpointError: a file is damaged.
    """
    rows: list[tuple[str, ...]] = [("parameter", "shape", "norm", "largest", *reader.manifest.moments)]
    for name in sorted(reader.names, key=_natural):
        tensor = reader.full(name)
        moments = (f"{float(reader.full(name, kind).double().norm()):.4e}" for kind in reader.manifest.moments)
        shape = " x ".join(map(str, tensor.shape))
        rows.append((name, shape, f"{float(tensor.double().norm()):.4e}", f"{_largest(tensor):.4e}", *moments))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def compare(one: CheckpointReader, other: CheckpointReader) -> tuple[list[str], list[Difference]]:
    """How two checkpoints differ: sentences about settings and parameters that only one has, and differing tensors.

    Raises:
        CheckpointError: a file is damaged.
    """
    remarks = []
    for key in ("step", "samples", "precision", "world_size", "fingerprints"):
        here, there = getattr(one.manifest, key), getattr(other.manifest, key)
        if here != there:
            remarks.append(f"{key}: {here} and {there}")
    for section, values in one.run.model_dump(mode="json").items():
        others = other.run.model_dump(mode="json")[section]
        remarks += [f"{section}.{k}: {v} and {others[k]}" for k, v in values.items() if v != others[k]]
    differences = []
    for name in sorted({*one.names, *other.names}, key=_natural):
        shapes = [reader.manifest.parameters[name].shape for reader in (one, other) if name in reader.names]
        if len(set(shapes)) != 1 or len(shapes) == 1:
            remarks.append(f"{name}: " + ("only in one" if len(shapes) == 1 else f"{shapes[0]} and {shapes[1]}"))
            continue
        kinds = [kind for kind in one.manifest.moments if kind in other.manifest.moments]
        for kind in ("weight", *kinds):
            here, there = one.full(name, kind), other.full(name, kind)
            if not torch.equal(here, there):
                differences.append(_difference(f"{kind}/{name}", here, there))
    return remarks, differences


def comparison(one: CheckpointReader, other: CheckpointReader) -> tuple[bool, str]:
    """Whether two checkpoints hold the same tensors, and a text about it.

    Raises:
        CheckpointError: a file is damaged.
    """
    remarks, differences = compare(one, other)
    lines = [*remarks]
    worst = sorted(differences, key=lambda difference: -difference.relative)
    for difference in worst[:MAX_SHOWN]:
        lines.append(
            f"{difference.name}: largest difference {difference.largest:.3e}, relative {difference.relative:.3e}"
        )
    if len(worst) > MAX_SHOWN:
        lines.append(f"... and {len(worst) - MAX_SHOWN} more tensors that differ less")
    same_parameters = {n: p.shape for n, p in one.manifest.parameters.items()} == {
        n: p.shape for n, p in other.manifest.parameters.items()
    }
    same = same_parameters and not differences
    lines.append("all tensors are equal, bit for bit" if same else f"{len(differences)} tensors differ")
    return same, "\n".join(lines)


def _difference(name: str, here: Tensor, there: Tensor) -> Difference:
    delta = here.double() - there.double()
    largest = _largest(delta)
    relative = float(delta.norm()) / max(float(here.double().norm()), 1e-300)
    return Difference(name, largest if largest == largest else float("inf"), relative)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.10 after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
