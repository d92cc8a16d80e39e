"""The plan of an evaluation: a saved model on any number of ranks, without what training needs.

Read from the checkpoint's manifest alone, without torch, so that it can be made on a login node.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.errors import CheckpointError
from megagpt.plan import load
from megagpt.plan.config import RunConfig
from megagpt.plan.deepspeed_config import DeepSpeedConfig, deepspeed_config_from_dict
from megagpt.plan.plan import Plan, make_plan
from megagpt.plan.recompute import FULL_ONLY_KEYS
from megagpt.storage import Location, RemotePath
from megagpt.storage.steps import step_folders

_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
           "expert_model_parallel_size", "pipeline_partition", "sequence_parallel")  # fmt: skip
_PRECISION = ("bf16", "bfloat16", "fp16", "data_types")


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of the run that wrote it."""

    folder: Location
    step: int
    tree: dict[str, Any]
    """Its run config."""
    deepspeed: dict[str, Any]
    """Its DeepSpeed config."""

    @property
    def run(self) -> RunConfig:
        return self.with_overrides(())

    def with_overrides(self, overrides: Sequence[str]) -> RunConfig:
        """Its run config with `section.key=value` changes.

        Raises:
            ConfigError: a key or value is wrong.
        """
        source = f"{self.folder}/manifest.json"
        tree = load.with_overrides(self.tree, overrides)
        return load.run_config_from_dict(tree, f"{source} with the command line's overrides" if overrides else source)


def read_saved_run(path: Location) -> SavedRun:
    """Look into a checkpoint, or the newest one of a run's checkpoint directory; no weights are read.

    Raises:
        CheckpointError: there is none, or its manifest cannot be read.
        StorageError: the store refuses or does not answer.
    """
    manifest = path / "manifest.json"
    if not manifest.is_file():
        folders = step_folders(path) if isinstance(path, RemotePath) or path.is_dir() else []
        manifests = (folder / "manifest.json" for folder in folders)
        newest = next((found for found in manifests if found.is_file()), None)
        if newest is None:
            raise CheckpointError(
                f"{path}: no checkpoint here; give a folder with manifest.json, or one with step-N folders"
            )
        manifest = newest
    try:
        tree = json.loads(manifest.read_text())
        return SavedRun(manifest.parent, int(tree["step"]), dict(tree["run"]), dict(tree["deepspeed"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{manifest}: is no manifest of a checkpoint ({type(error).__name__}: {error}); use another checkpoint"
        ) from None


def evaluation_plan(
    saved: SavedRun, world_size: int, overrides: Sequence[str] = (), deepspeed: DeepSpeedConfig | None = None
) -> Plan:
    """The saved model on a number of ranks: in the layout it was trained in if the ranks allow it, else each rank with
    the whole model; overrides decide otherwise.

    Args:
        saved: the run.
        world_size: ranks.
        overrides: changes of its run config.
        deepspeed: precision, ZeRO stage and micro-batch; default: precision and micro-batch of the run.

    Raises:
        ConfigError: a rule is broken.
    """
    run, tree = saved.with_overrides(overrides), saved.run.model_dump(mode="json")
    tree["training"] = {key: value for key, value in tree["training"].items() if not _is_of_training(key)}
    tree["optimizer"] = {**tree["optimizer"], "name": "sgd"}  # keeps nothing beside the weights
    tree["checkpoint"] = tree["logging"] = {}  # of no use here, and perhaps of a place that this host does not know
    layout = run.parallel
    if world_size % layout.ranks_per_replica:
        tree["parallel"] = {key: value for key, value in tree["parallel"].items() if key not in _LAYOUT}
    elif world_size * layout.context_parallel_size // layout.ranks_per_replica % layout.expert_model_parallel_size:
        tree["parallel"]["expert_model_parallel_size"] = 1
    run = SavedRun(saved.folder, saved.step, tree, {}).with_overrides(overrides)
    if deepspeed is None:
        data = max(1, world_size // run.parallel.ranks_per_replica)
        micro = saved.deepspeed.get("train_micro_batch_size_per_gpu") or 1
        # With a micro-batch for each stage a pipeline idles no more than half of the time.
        sizes = {
            "train_micro_batch_size_per_gpu": micro,
            "train_batch_size": micro * data * run.parallel.pipeline_model_parallel_size,
        }
        kept = {key: value for key, value in saved.deepspeed.items() if key in _PRECISION}
        source = f"{saved.folder}/manifest.json (deepspeed)"
        deepspeed = deepspeed_config_from_dict({**kept, **sizes, "zero_optimization": {"stage": 1}}, source)
    return make_plan(run, deepspeed, world_size)


def _is_of_training(key: str) -> bool:
    """Says how to do what an evaluation does not do, or what another host may not be able to."""
    return (
        key in ("recompute_granularity", "flash_attention", "compile", "deterministic", "moe_grouped_gemm")
        or key in FULL_ONLY_KEYS
    )
