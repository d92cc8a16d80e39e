"""Activation checkpointing: which layers of a pipeline stage are computed again in the backward pass."""

from dataclasses import dataclass

from megagpt.plan.config import TrainingConfig

FULL_ONLY_KEYS = (
    "recompute_method",
    "recompute_num_layers",
    "distribute_saved_activations",
    "offload_saved_activations",
)
"""Keys of the training section that refine full recomputation."""


@dataclass(frozen=True)
class LayerRun:
    """Consecutive transformer layers of one stage that are treated alike."""

    num_layers: int
    """Layers of the run, at least one."""
    is_recomputed: bool
    """True: only the input of the whole run is kept, and the backward pass computes the run again."""


def layer_runs(training: TrainingConfig, num_stage_layers: int) -> tuple[LayerRun, ...]:
    """Cut the transformer layers of a stage into runs; a run never crosses stages.

    Methods are Megatron-Core's: `uniform` makes runs of `recompute_num_layers` layers (the last may be shorter),
    `block` recomputes the first `recompute_num_layers` layers of the stage one by one and keeps the rest.

    Args:
        training: gives granularity, method and number of layers.
        num_stage_layers: transformer layers of the stage.
    """
    if training.recompute_granularity != "full":
        return (LayerRun(num_stage_layers, False),) if num_stage_layers else ()
    size = min(training.recompute_num_layers, num_stage_layers)
    if training.recompute_method == "block":
        kept = num_stage_layers - size
        return (LayerRun(1, True),) * size + ((LayerRun(kept, False),) if kept else ())
    whole, rest = divmod(num_stage_layers, training.recompute_num_layers)
    return (LayerRun(size, True),) * whole + ((LayerRun(rest, True),) if rest else ())


def recomputed_layers(training: TrainingConfig, stage_layers: list[int]) -> int:
    """Layers of the whole model that are recomputed.

    Args:
        training: gives granularity, method and number of layers.
        stage_layers: transformer layers of each stage.
    """
    return sum(run.num_layers for layers in stage_layers for run in layer_runs(training, layers) if run.is_recomputed)
