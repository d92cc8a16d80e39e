"""Read a run config: YAML file or dict, preset, `key=value` overrides, and errors in the user's words.

Order of precedence, weakest first: defaults, the folder of model.init_from, preset, file, overrides. A key that is null
asks for its default.
"""

import copy
import re
from collections.abc import Hashable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megagpt.errors import ConfigError, exit_code_of
from megagpt.plan.config import ModelConfig, RunConfig, without_nulls
from megagpt.plan.hf_config import read_hf_model
from megagpt.plan.wording import describe_validation_error


class RunYamlLoader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number and refuses a key written twice.

    PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent, so that `lr: 1e-3` would be text; and it
    lets the last of two equal keys win silently.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """One mapping of the file.

        Raises:
            yaml.constructor.ConstructorError: it has a key twice.
        """
        seen: set[Any] = set()
        for key_node, _ in node.value:
            # nodes other than scalars are left to PyYAML; `<<` (merge) may legitimately appear more than once
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} appears twice; keep one", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


RunYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run config of one YAML file.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts that win over the file; values are read as YAML.

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; all problems are reported at once.
    """
    tree = read_yaml_mapping(Path(path))
    problems = _apply_overrides(tree, overrides)
    source = f"{path} with the command line's overrides" if overrides else str(path)
    return _build(tree, source=source, problems=problems)


def run_config_from_dict(tree: dict[str, Any], source: str = "run config") -> RunConfig:
    """Build the run config from an in-memory tree; `RunConfig.model_dump(mode="json")` round-trips through it.

    Args:
        tree: sections as in the YAML file; left unchanged.
        source: name put before each problem.

    Raises:
        ConfigError: any key or value is wrong; all problems are reported at once.
    """
    return _build(copy.deepcopy(tree), source=source, problems=[])


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of an in-memory tree with `section.key=value` texts applied; values are read as YAML.

    Raises:
        ConfigError: an override is malformed; all problems are reported at once.
    """
    changed = copy.deepcopy(tree)
    if problems := _apply_overrides(changed, overrides):
        raise ConfigError(problems)
    return changed


def preset_names() -> list[str]:
    """Names of the shipped models, sorted."""
    files = resources.files("megagpt").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(preset: str) -> dict[str, Any]:
    """Read the keys of a model section.

    Args:
        preset: name of a shipped model, or path of a YAML file (recognised by a slash or the suffix .yaml/.yml),
            relative to the working directory.

    Raises:
        ConfigError: there is no such preset, or its file cannot be read or names a preset itself.
    """
    if "/" in preset or preset.endswith((".yaml", ".yml")):
        keys = read_yaml_mapping(Path(preset))
        source = preset
    else:
        shipped = preset_names()
        if preset not in shipped:
            raise ConfigError(
                f"model.preset={preset!r} is not a shipped model; use one of {', '.join(shipped)}, or a path of a "
                "YAML file (ending in .yaml)"
            )
        source = f"preset {preset}"
        text = resources.files("megagpt").joinpath("presets", f"{preset}.yaml").read_text(encoding="utf-8")
        keys = parse_yaml(text, source)
    if "preset" in keys:
        raise ConfigError(f"{source}: a preset cannot name a preset (preset={keys['preset']!r}); remove that key")
    return keys


def _build(tree: Any, source: str, problems: list[str]) -> RunConfig:
    """Expand the preset and validate the tree; `problems` found before are reported along with the new ones."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must hold sections (model:, training:, ...), not {tree!r}")
    preset_problems: list[str] = []
    try:
        tree = _expand_init_from(_expand_preset(tree))
    except ConfigError as error:
        preset_problems = error.problems
    config, findings = None, []
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        findings = describe_validation_error(error, tree)
        if preset_problems:  # what the preset would have brought is not the user's to write
            findings = [text for text in findings if not (text.startswith("model.") and " is missing" in text)]
    problems = [*problems, *preset_problems, *findings]
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    assert config is not None, "every finding of pydantic must be worded"
    return config


def _expand_preset(tree: dict[str, Any]) -> dict[str, Any]:
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("preset"), str):
        return tree
    if all(name in model for name in ModelConfig.model_fields):
        # A dumped config names its preset but needs nothing from it, and must load where the preset's file is absent.
        return tree
    return {**tree, "model": {**load_preset(model["preset"]), **without_nulls(model)}}


_FREE_WITH_INIT_FROM = (
    "preset",
    "init_from",
    "vocab_size",
    "init_method_std",
    "hidden_dropout",
    "attention_dropout",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
)
"""Keys that may differ from those of the model that a run starts from: they change no logit, or give tokens rows."""


def _expand_init_from(tree: dict[str, Any]) -> dict[str, Any]:
    """Take what the model section does not say from the folder of `model.init_from`.

    Raises:
        ConfigError: the folder has no readable config.json, or the two contradict each other.
    """
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_from"), str):
        return tree
    if all(name in model for name in ModelConfig.model_fields):
        return tree  # as for presets: a dumped config needs nothing from the folder
    folder = model["init_from"]
    _, found = read_hf_model(folder)
    merged = {**found, **without_nulls(model)}
    try:
        here, there = ModelConfig.model_validate(merged), ModelConfig.model_validate(found)
    except ValidationError:
        return {**tree, "model": merged}  # worded with all other findings
    free = list(_FREE_WITH_INIT_FROM)
    if here.position_embedding_type == "rope":
        free.append("max_position_embeddings")
    problems = [
        f"model.{key}={getattr(here, key)} but model.init_from={folder} has {getattr(there, key)}; remove model.{key}, "
        "or start from another model"
        for key in without_nulls(model)
        if key not in free and getattr(here, key) != getattr(there, key)
    ]
    if problems:
        raise ConfigError(problems)
    return {**tree, "model": merged}


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises:
        ConfigError: it cannot be read, or is not YAML that holds a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        text = f"{path}: cannot be read ({error.strerror}); check the path"
        raise ConfigError(text, exit_code=exit_code_of(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """What a YAML text holds; nothing is an empty mapping.

    Raises:
        ConfigError: it is not YAML that holds a mapping.
    """
    try:
        tree = yaml.load(text, Loader=RunYamlLoader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {_yaml_problem(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must hold `key: value` lines, not {tree!r}")
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Word a YAML error in one line, with line and column where known (both counted from 1)."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{problem}"


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set `section.key=value` overrides in the raw tree, in place; what is wrong with any of them."""
    problems = []
    for override in overrides:
        try:
            apply_override(tree, override)
        except ConfigError as error:
            problems += error.problems
    return problems


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the raw tree, in place.

    Raises:
        ConfigError: it is not of that form.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, Loader=RunYamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML ({_yaml_problem(error)})") from error
    branch = tree
    for depth, key in enumerate(keys[:-1]):
        child = branch.get(key)
        if child is None:
            child = branch[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])}={child!r} has no keys below it")
        branch = child
    branch[keys[-1]] = value
