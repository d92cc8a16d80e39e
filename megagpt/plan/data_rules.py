"""Rules of the `data` section: each returns one sentence per broken rule, with the fix."""

from collections import Counter
from itertools import pairwise

from megagpt.plan.config import RunConfig
from megagpt.plan.data_config import DataConfig
from megagpt.storage import RemotePath, location
from megagpt.storage.filesystem import problem_of

SMALLEST_SHARE = 1e-6
"""Finding the place in a mixture costs 1 / (smallest share) steps of about a microsecond at each start."""


def check_data(run: RunConfig) -> list[str]:
    """Which datasets there are, how they are mixed and what is held out."""
    data = run.data
    return [
        *_check_split(data),
        *_check_names(data),
        *_check_amounts(data),
        *_check_stages(run),
        *_check_fill_in_middle(data),
        *_check_sample_options(data),
        *_check_places(data),
    ]


def _check_split(data: DataConfig) -> list[str]:
    split = data.split
    if data.has_held_out_files and split[1:] != (0, 0) and split != DataConfig().split:
        given = " and ".join(f"data.{key}" for key in ("validation", "test") if getattr(data, key))
        return [
            f"data.split={list(split)} splits documents off, but {given} names datasets for that; remove split, or "
            f"{given}"
        ]
    if min(split) < 0 or split[0] <= 0:
        return [
            f"data.split={list(split)} must hold shares of at least 0, and the first (training) must be above 0; "
            "for example [90, 5, 5]"
        ]
    return []


def _check_names(data: DataConfig) -> list[str]:
    problems = []
    if data.prefix is not None and data.datasets:
        problems.append(
            f"data.prefix={data.prefix} and data.datasets are both set; move the prefix into datasets, or remove one"
        )
    for key in ("datasets", "validation", "test"):
        entries = getattr(data, key)
        for label, times in Counter(entry.label for entry in entries).items():
            if times > 1 or not label or "/" in label:
                rule = "is the name of several datasets" if times > 1 else "must be a text without /"
                problems.append(f"data.{key}: name {label!r} {rule}; give each a `name` of its own")
        for prefix, times in Counter(entry.prefix for entry in entries).items():
            if times > 1:
                problems.append(f"data.{key}: prefix={prefix} appears {times} times; list it once, with another weight")
    trained = {entry.prefix for entry in data.mixed}
    for key in ("validation", "test"):
        for entry in getattr(data, key):
            if entry.prefix in trained or (key == "test" and entry.prefix in {x.prefix for x in data.validation}):
                problems.append(
                    f"data.{key}: prefix={entry.prefix} is used twice, but no document may be in two splits; give "
                    "another dataset, or use data.split"
                )
    return problems


def _check_places(data: DataConfig) -> list[str]:
    """What is known of URLs without access."""
    problems = []
    for key, entries in (("datasets", data.mixed), ("validation", data.validation), ("test", data.test)):
        for entry in entries:
            place = location(entry.prefix)
            if isinstance(place, RemotePath) and (problem := problem_of(place.url)):
                problems.append(f"data.{'prefix' if data.prefix == entry.prefix else key}: {problem}")
    if data.cache_directory is not None and isinstance(location(data.cache_directory), RemotePath):
        problems.append(f"data.cache_directory={data.cache_directory} is in an object store; give a local folder")
    return problems


def _check_fill_in_middle(data: DataConfig) -> list[str]:
    if data.fill_in_middle is None:
        return []
    tokens = [getattr(data.fill_in_middle, f"{role}_token") for role in ("prefix", "middle", "suffix")]
    problems = []
    if data.tokenizer is None:
        problems.append("data.fill_in_middle needs the ids of its special tokens; set data.tokenizer")
    if len(set(tokens)) < 3:
        problems.append(
            f"data.fill_in_middle: prefix_token, middle_token and suffix_token are {', '.join(tokens)}; name three "
            "different ones"
        )
    return problems


def _check_sample_options(data: DataConfig) -> list[str]:
    resets = [key for key in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss") if getattr(data, key)]
    problems = []
    if resets and data.packing != "stream":
        problems.append(
            f"data.packing={data.packing} puts one document into each sample, in which there is nothing to reset; "
            f"remove {' and '.join(f'data.{key}' for key in resets)}"
        )
    needs = [*resets, *(["loss_spans"] if data.loss_spans else [])]
    if needs and data.tokenizer is None and (data.prefix or data.datasets):
        problems.append(
            f"{' and '.join(f'data.{key}' for key in needs)} must know the tokens that end documents and mark spans; "
            "set data.tokenizer"
        )
    if data.fill_in_middle is not None and data.packing != "stream":
        problems.append(
            f"data.fill_in_middle needs room for its tokens, which data.packing={data.packing} does not have in a "
            "document's own sample; use packing: stream, with reset_attention_mask if documents are to be kept apart"
        )
    if data.fill_in_middle is not None and data.loss_spans is not None:
        problems.append(
            "data.fill_in_middle moves parts of documents away from the tokens that data.loss_spans looks for; remove "
            "one of them"
        )
    if data.packing != "stream" and any(entry.tokens is not None for entry in data.datasets):
        problems.append(
            f"data.datasets: tokens are not what samples are counted by if data.packing={data.packing} pads them; give "
            "epochs or weights"
        )
    if data.loss_spans is not None and (not data.loss_spans.start or data.loss_spans.end == ""):
        problems.append("data.loss_spans: start and end must not be empty; name the texts that begin and end a span")
    return problems


def _check_amounts(data: DataConfig) -> list[str]:
    problems = []
    kinds = {}
    for entry in data.datasets:
        given = [key for key in ("weight", "epochs", "tokens") if getattr(entry, key) is not None]
        if len(given) > 1:
            problems.append(f"data.datasets: {entry.label} has {' and '.join(given)}; give one of them")
        kinds[entry.label] = "nothing" if not given else "weight" if given[0] == "weight" else "epochs or tokens"
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{label} has {kind}" for label, kind in kinds.items())
        problems.append(
            f"data.datasets: {told}; give all a weight, or all epochs or tokens, or none of them anything (then sizes "
            "decide)"
        )
    elif kinds and "nothing" not in kinds.values() and data.temperature != 1:
        problems.append(
            f"data.temperature={data.temperature:g} is for shares that follow sizes, but data.datasets say "
            f"{next(iter(kinds.values()))}; remove one of the two"
        )
    weights = {entry.label: entry.weight for entry in data.datasets if entry.weight is not None}
    if weights and len(weights) == len(data.datasets):
        problems += _check_weights("data.datasets", weights)
    if not data.datasets and data.temperature != 1:
        problems.append(
            f"data.temperature={data.temperature:g} mixes several datasets, but data.datasets is empty; remove it"
        )
    return problems


def _check_stages(run: RunConfig) -> list[str]:
    data, problems = run.data, []
    if data.stages and not data.datasets:
        return ["data.stages changes a mixture, but data.datasets is empty; list the datasets there"]
    labels = [entry.label for entry in data.datasets]
    for stage in data.stages:
        where = f"data.stages from_tokens={stage.from_tokens}"
        unknown = [label for label in stage.weights if label not in labels]
        if unknown:
            problems.append(f"{where}: {', '.join(unknown)} is in no data.datasets; they are {', '.join(labels)}")
        problems += _check_weights(where, stage.weights)
    starts = [stage.from_tokens for stage in data.stages]
    for before, behind in pairwise(starts):
        if behind - before < run.training.seq_length:
            problems.append(
                f"data.stages: from_tokens={behind} follows {before}; list stages in order, at least one sample of "
                f"training.seq_length={run.training.seq_length} tokens apart"
            )
    return problems


def _check_weights(where: str, weights: dict[str, float]) -> list[str]:
    total = sum(weights.values())
    if total <= 0:
        return [f"{where}: all weights are 0; give at least one dataset a weight above 0"]
    return [
        f"{where}: {label} has weight={weight:g}, a share of {weight / total:.1e}, less than {SMALLEST_SHARE:g}; raise "
        "it, or use 0"
        for label, weight in weights.items()
        if 0 < weight < SMALLEST_SHARE * total
    ]
