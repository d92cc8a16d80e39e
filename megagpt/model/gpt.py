"""A GPT as a list of pipeline layers, and the same list in one module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megagpt.model.documents import Documents
from megagpt.model.layers import Embedding, Head, Layer, TiedHead
from megagpt.model.norm import Norm
from megagpt.model.recompute import with_recomputation
from megagpt.model.rotary import build_rotary
from megagpt.model.transformer_config import transformer_config
from megagpt.plan import Plan


@dataclass(frozen=True)
class PipelineLayer:
    """One entry of the list: which module to build, and what it shares its weight with."""

    prefix: str
    """Canonical prefix of its parameters."""
    module: type[nn.Module]
    """Class of the layer."""
    arguments: tuple[Any, ...]
    """Arguments of its constructor."""
    tied: str | None = None
    """Key that the layers sharing one weight have in common."""
    tied_weight: str = "word_embeddings.weight"
    """Name of the shared weight in the module."""

    def build(self, **extra: Any) -> nn.Module:
        """Make the module; called only in the process that holds it."""
        return self.module(*self.arguments, **extra)


def pipeline_layers(plan: Plan) -> list[PipelineLayer]:
    """Embedding, transformer layers, final norm, head: `num_layers` + 3 entries in order."""
    config, model = transformer_config(plan), plan.model
    # One table per base and process, whatever the number of layers.
    rotary, windowed = build_rotary(plan), build_rotary(plan, windowed=True)
    rotaries = [windowed if model.window_of_layer(i) else rotary for i in range(model.num_layers)]
    tied = None if model.untie_embeddings_and_output_weights else "embedding"
    return [
        PipelineLayer("embedding", Embedding, (config, plan), tied),
        *(PipelineLayer(f"layers.{i}", Layer, (config, plan, i, rotaries[i])) for i in range(model.num_layers)),
        PipelineLayer("final_norm", Norm, (config, model.hidden_size, model.layernorm_epsilon)),
        PipelineLayer("head", TiedHead if tied else Head, (config, plan), tied),
    ]


class GPT(nn.Module):
    """All pipeline layers in one module: for DeepSpeedEngine (PP = 1), tools and tests.

    Args:
        plan: the architecture.
        finish: called with the prefix of its parameters' names and each layer, before the next one is built.
    """

    def __init__(self, plan: Plan, finish: Callable[[str, nn.Module], None] = lambda prefix, layer: None):
        super().__init__()

        def build(layer: PipelineLayer, **extra: Any) -> nn.Module:
            module = layer.build(**extra)
            finish(layer.prefix, module)
            return module

        first, *middle, norm, last = pipeline_layers(plan)
        self.embedding = build(first)
        self.layers = nn.ModuleList(build(layer) for layer in middle)
        self._runs = with_recomputation(list(self.layers), plan)
        self.final_norm = build(norm)
        self.head = build(last, word_embeddings=self.embedding.word_embeddings) if last.tied else build(last)

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        loss_tokens: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Loss of a micro-batch if labels are given, else logits.

        Args:
            tokens_BS: [B, S] token ids.
            labels_BS: [B, S] ids of the next tokens.
            loss_tokens: if given, labels below 0 do not count, and the sum over the others is divided by this scalar.
            documents: of the samples; None: each is one document.

        Returns:
            Scalar mean loss in fp32, or logits [S, B, V / TP].
        """
        hidden_SBH = self.embedding(tokens_BS, documents)
        for run in self._runs:
            hidden_SBH = run(hidden_SBH, documents)
        return self.head(self.final_norm(hidden_SBH), labels_BS=labels_BS, loss_tokens=loss_tokens)
