"""Words for errors: suggestions for mistyped keys, lists of values, and pydantic's findings as sentences."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megagpt.plan.config import RunConfig
from megagpt.plan.section import inner_section, is_count

# Keys that users of other trainers look for in the run config, and where they live here.
DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "zero_optimization",
    "bf16",
    "fp16",
    "gradient_clipping",
)
DERIVED_KEYS = {
    ("model", "num_query_groups"),
    ("model", "kv_channels"),
    ("model", "ffn_hidden_size"),
    ("model", "moe_ffn_hidden_size"),
    ("training", "seq_length"),
    ("optimizer", "decay_steps"),
}

# Values of several parts, judged as a whole.
WHOLE_VALUES: dict[tuple[int | str, ...], str] = {
    ("data", "split"): "a list of three numbers such as [90, 5, 5]",
    ("parallel", "pipeline_partition"): (
        "uniform, parameters, or a list with the number of transformer layers of each stage such as [7, 8, 8, 7]"
    ),
}


def or_list(values: Iterable[object]) -> str:
    """Join values as `1, 2 or 4`."""
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def shown(value: object) -> str:
    """A value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def suggestion(key: str, known: Sequence[str]) -> str:
    """Say which known key was probably meant, or list all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"


def describe_validation_error(error: ValidationError, tree: dict[str, Any]) -> list[str]:
    """Turn pydantic's findings on a run config into sentences with key, value, rule and fix.

    Args:
        error: what pydantic raised for `tree`.
        tree: the raw sections, used to explain sizes that could not be derived.
    """
    sentences = (_describe_finding(finding, tree) for finding in error.errors())
    return list(dict.fromkeys(sentence for sentence in sentences if sentence is not None))


def _describe_finding(finding: ErrorDetails, tree: dict[str, Any]) -> str | None:
    """Word one finding; None if it only follows from another one that is reported too."""
    location = finding["loc"]
    if location[:2] in WHOLE_VALUES:
        section, key = map(str, location[:2])
        return f"{section}.{key}={tree[section][key]!r} must be {WHOLE_VALUES[location[:2]]}"
    key = ".".join(map(str, location))
    if finding["type"] == "missing":
        return _describe_missing(location, tree)
    if location in DERIVED_KEYS and not _is_written(location, tree):
        return None  # its source has the same wrong value, which is reported
    if finding["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key}: unknown key; {_hint_for_unknown_key(location)}"
    if finding["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}={finding['input']!r} must be a section with keys of its own"
    return f"{key}={finding['input']!r} must be {rule_of(finding)}"


def _is_written(location: tuple[int | str, ...], tree: dict[str, Any]) -> bool:
    section = tree.get(str(location[0]))
    return isinstance(section, dict) and section.get(location[1]) is not None


def _describe_missing(location: tuple[int | str, ...], tree: dict[str, Any]) -> str | None:
    key = ".".join(str(part) for part in location)
    if len(location) == 1:
        return f"section `{key}:` is missing; add it"
    if location not in DERIVED_KEYS:
        preset = "; write it, or name a model.preset that has it" if location[0] == "model" else "; write it"
        return f"{key} is missing{preset}"
    model = tree.get("model")
    heads: Any = model.get("num_attention_heads") if isinstance(model, dict) else None
    hidden: Any = model.get("hidden_size") if isinstance(model, dict) else None
    if location == ("model", "kv_channels") and is_count(heads) and is_count(hidden):
        nearest = max(heads, hidden // heads * heads)
        return (
            f"model.hidden_size={hidden} is not divisible by model.num_attention_heads={heads}; use hidden_size "
            f"{or_list(sorted({nearest, nearest + heads}))}, or set model.kv_channels (the size of one head)"
        )
    return None  # its source is missing or malformed, which is reported


def _hint_for_unknown_key(location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    sections = {section: field.annotation for section, field in RunConfig.model_fields.items()}
    if name in DEEPSPEED_KEYS or name.startswith("micro_batch") or name in ("global_batch_size", "batch_size"):
        return "batch sizes, precision, ZeRO and clipping belong in the DeepSpeed JSON (--deepspeed_config)"
    known, fields = list(sections), RunConfig.model_fields
    for part in location[:-1]:
        if isinstance(part, int):  # an entry of a list of sections
            continue
        field = fields.get(part)
        section = inner_section(field) if field is not None else None
        if section is None:
            break
        known, fields = list(section.model_fields), section.model_fields
    homes = [section for section, kind in sections.items() if name in _keys_of(kind)]
    if homes and name not in known:
        return f"did you mean {or_list(f'{home}.{name}' for home in homes)}?"
    return suggestion(name, known)


def _keys_of(section: Any) -> Sequence[str]:
    return list(section.model_fields)


def rule_of(finding: ErrorDetails) -> str:
    """The rule of one finding, to follow the words `must be`."""
    context = finding.get("ctx", {})
    kind = finding["type"]
    if kind.startswith("int_"):
        return "an integer"
    if kind in ("float_type", "float_parsing", "finite_number"):
        return "a number (finite, without quotes)"
    if kind == "tuple_type":
        return "a list"
    if kind == "bool_type":
        return "true or false (without quotes)"
    if kind == "string_type":
        return "text (in quotes if YAML reads it as a number, a date or true/false)"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        return next(f"{word} {context[limit]}" for limit, word in words.items() if limit in context)
    return f"valid: {finding['msg']}"
