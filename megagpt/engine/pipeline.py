"""The list of layers as DeepSpeed's PipelineModule, cut where the Plan says."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor

from megagpt.engine.batches import PreparedBatch
from megagpt.model import (
    Documents,
    Head,
    PipelineLayer,
    TiedHead,
    pipeline_layers,
    takes_documents,
    with_recomputation,
)
from megagpt.plan import Plan


class Feed:
    """Hands a stage its micro-batches, and its layers the documents of the one whose forward pass they are in.

    Hidden states alone flow between stages: every stage takes the documents from its own micro-batches. The first and
    the last stage load these when the schedule says so, those between when a forward pass begins.
    """

    def __init__(self, loads: bool, marks_documents: bool):
        """Hand out nothing yet.

        Args:
            loads: whether the schedule has the stage load micro-batches.
            marks_documents: whether micro-batches of training and evaluation have documents.
        """
        self.documents: Documents | None = None
        self._loads, self._marks_documents = loads, marks_documents
        self._waiting: deque[Documents | None] = deque()
        self._batches: Iterator[PreparedBatch] = iter(())

    def begin(self, batches: Iterator[PreparedBatch]) -> Iterator[tuple[Tensor, Any]]:
        """Go over to other micro-batches; what DeepSpeed's schedule loads: inputs, and labels or all for the loss."""
        self._batches = batches
        self._waiting.clear()
        return map(self._load, batches)

    def _load(self, batch: PreparedBatch) -> tuple[Tensor, Any]:
        self._waiting.append(batch.documents)
        labels = batch.labels_BS if batch.loss_tokens is None else (batch.labels_BS, batch.loss_tokens)
        return batch.tokens_BS, labels

    def enter_forward(self) -> None:
        """The next forward pass begins."""
        if self._loads:
            self.documents = self._waiting.popleft()
        elif self._marks_documents:
            self.documents = next(self._batches).documents

    def given_to(self, function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """A layer of the stage that takes documents, called without."""
        return lambda hidden: function(hidden, self.documents)


@dataclass(frozen=True)
class _TiedGradient:
    """A tied weight as the pipeline engine looks at it when it sums its gradient over the stages that hold it."""

    weight: Any

    @property
    def grad(self) -> Tensor | None:
        accumulated: Tensor | None = getattr(self.weight, "grad_accum", None)
        return self.weight.grad if accumulated is None else accumulated

    @property
    def _hp_grad(self) -> Tensor | None:
        return self.weight._hp_grad


class PlannedPipeline(PipelineModule):
    """PipelineModule with the Plan's stage bounds in place of DeepSpeed's own partitioning, and with tied gradients
    where ZeRO 1 keeps them: if it accumulates in another type than the weights', `weight.grad` is None, and the engine
    would silently sum nothing."""

    feed: Feed
    """Gives the stage its micro-batches."""

    def get_tied_weights_and_groups(self) -> list[tuple[_TiedGradient, Any]]:
        return [(_TiedGradient(weight), group) for weight, group in super().get_tied_weights_and_groups()]

    def _partition_layers(self, method: str = "") -> None:
        self.parts = [int(bound) for bound in method.split(",")]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


def pipeline_module(plan: Plan) -> PlannedPipeline:
    """This rank's stage of the model."""
    # Megatron-Core's rank order: tensor parallel fastest, then context and data parallel (one axis to DeepSpeed),
    # pipeline slowest.
    topology = ProcessTopology(
        axes=["pipe", "data", "model"],
        dims=[plan.pipeline_parallel_size, plan.gradient_parallel_size, plan.tensor_parallel_size],
    )
    module = PlannedPipeline(
        layers=[_layer_spec(layer) for layer in pipeline_layers(plan)],
        topology=topology,
        partition_method=",".join(map(str, plan.stage_bounds)),
        activation_checkpoint_interval=0,  # DeepSpeed's own would replay other dropout masks
    )
    if module.stage_id == plan.pipeline_parallel_size - 1:
        module.loss_fn = _HeadAsLoss(module.forward_funcs[-1])
        module.forward_funcs[-1] = module.loss_fn.prepare
    module.feed = Feed(module.stage_id in (0, plan.pipeline_parallel_size - 1), plan.run.data.marks_documents)
    module.forward_funcs = [
        module.feed.given_to(function) if takes_documents(function) else function
        for function in with_recomputation(module.forward_funcs, plan)
    ]
    return module


@dataclass(frozen=True)
class _HeadAsLoss:
    """The head of the last stage as the loss function of the pipeline: its product is formed with the loss, as that
    needs the labels."""

    head: Head | TiedHead

    def prepare(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """What the stage gives: the head's input, and its weight too. DeepSpeed clears the 16-bit gradients when the
        backward pass arrives at the stage's outputs, so no weight may get its gradient before."""
        weight = self.head.projection_weight
        return hidden_SBH, weight.view_as(weight)

    def __call__(self, prepared: tuple[Tensor, Tensor], labels: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        hidden_SBH, weight = prepared
        labels_BS, loss_tokens = (labels, None) if isinstance(labels, Tensor) else labels
        return self.head.projection(hidden_SBH, weight, labels_BS, loss_tokens)

    def logits(self, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """[S, B, V / TP]."""
        return self.head.projection(*prepared)


def _layer_spec(layer: PipelineLayer) -> LayerSpec:
    if layer.tied is None:
        return LayerSpec(layer.module, *layer.arguments)
    return TiedLayerSpec(layer.tied, layer.module, *layer.arguments, tied_weight_attr=layer.tied_weight)
