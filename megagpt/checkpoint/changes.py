"""What may not change between saving and resuming unless the user says so: model, dataset, tokenizer and seed."""

from collections.abc import Mapping
from typing import Any

from megagpt.checkpoint.reader import CheckpointReader
from megagpt.errors import CheckpointError
from megagpt.parallel.console import Console
from megagpt.plan import Plan
from megagpt.plan.layout import count_parameters

_FREE_MODEL_KEYS = {"preset", "init_from", "hidden_dropout", "attention_dropout"}
_SHOWN_DIGITS = 12


def changes(reader: CheckpointReader, plan: Plan, fingerprints: Mapping[str, str]) -> dict[str, list[str]]:
    """What differs from the run that wrote a checkpoint, one phrase each, by `model`, `dataset`, `tokenizer`, `seed`.

    A fingerprint that only one of the two runs has is not compared.

    Args:
        reader: the checkpoint.
        plan: the run that wants to go on from it.
        fingerprints: of that run's dataset and tokenizer.
    """
    there, here = reader.run, plan.run
    found: dict[str, list[str]] = {"model": [], "dataset": [], "tokenizer": [], "seed": []}
    for key in type(here.model).model_fields:
        if key not in _FREE_MODEL_KEYS:
            _compare(found["model"], f"model.{key}", getattr(here.model, key), getattr(there.model, key))
    saved = reader.manifest.fingerprints
    for kind in ("dataset", "tokenizer"):
        if kind in fingerprints and kind in saved and fingerprints[kind] != saved[kind]:
            given, name = (here.data.prefix, "prefix") if kind == "dataset" else (here.data.tokenizer, "tokenizer")
            found[kind].append(
                f"data.{name}={given} has fingerprint {fingerprints[kind][:_SHOWN_DIGITS]}... "
                f"(there {getattr(there.data, name)} with {saved[kind][:_SHOWN_DIGITS]}...)"
            )
    _compare(found["dataset"], "data.split", list(here.data.split), list(there.data.split))
    tokens_seen = reader.manifest.samples * there.training.seq_length
    ours, theirs = here.data.mixture_until(tokens_seen), there.data.mixture_until(tokens_seen)
    for key in ours:
        _compare(found["dataset"], f"data.{key}", ours[key], theirs[key])
    ours, theirs = here.data.sample_options, there.data.sample_options
    for key in ours:
        _compare(found["dataset"], f"data.{key}", ours[key], theirs[key])
    _compare(found["dataset"], "training.seq_length", here.training.seq_length, there.training.seq_length)
    _compare(found["seed"], "training.seed", here.training.seed, there.training.seed)
    return {kind: phrases for kind, phrases in found.items() if phrases}


def require_unchanged(
    reader: CheckpointReader, plan: Plan, fingerprints: Mapping[str, str], console: Console | None = None
) -> None:
    """See that a checkpoint belongs to the run that wants to go on from it.

    Args:
        reader: the checkpoint.
        plan: the run; its `checkpoint.allow_changes` says what may differ all the same.
        fingerprints: of its dataset and tokenizer.
        console: where changes that are allowed are told.

    Raises:
        CheckpointError: something else differs; the message lists the keys.
    """
    found = changes(reader, plan, fingerprints)
    allowed = plan.run.checkpoint.allow_changes
    refused = {kind: phrases for kind, phrases in found.items() if kind not in allowed}
    if refused:
        shown = ", ".join(phrase for phrases in refused.values() for phrase in phrases)
        what = " and ".join(refused)
        advice = "use its settings or another checkpoint.directory"
        if count_parameters(plan.model) == count_parameters(reader.run.model):  # else nothing can make them fit
            advice += f", or go on all the same with checkpoint.allow_changes=[{', '.join(found)}]"
        raise CheckpointError(f"{reader.folder} belongs to another {what}: {shown}; {advice}")
    for kind, phrases in found.items():
        if console is not None:
            console.warn(f"going on from {reader.folder} with another {kind}: {', '.join(phrases)}")


def _compare(found: list[str], key: str, here: Any, there: Any) -> None:
    if here != there:
        found.append(f"{key}={here!r} (there {there!r})")
