"""Names of parameters, and how each one is cut over the tensor-parallel ranks.

A parameter has one canonical name and one full tensor, whatever the engine and the layout. Everything that crosses
layouts (initial weights, checkpoints, conversion) speaks of these.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

# The MLP of a dense layer, one of the routed experts, or the shared one.
_MLP = r"\.mlp\.(experts\.\d+\.|shared_experts\.)?"

# Canonical name -> (dimension that is cut, gate and up halves side by side?, rows are tokens?).
_RULES: tuple[tuple[re.Pattern[str], int | None, bool, bool], ...] = (
    (re.compile(r"^(embedding\.word_embeddings|head)\.weight$"), 0, False, True),
    (re.compile(r"\.self_attention\.linear_qkv\.(weight|bias)$"), 0, False, False),
    (re.compile(r"\.self_attention\.linear_proj\.weight$"), 1, False, False),
    (re.compile(rf"{_MLP}linear_fc1\.(weight|bias)$"), 0, True, False),
    (re.compile(rf"{_MLP}linear_fc2\.weight$"), 1, False, False),
    (re.compile(r"\.(linear_proj|linear_fc2)\.bias$"), None, False, False),
    (re.compile(r"(_layernorm|final_norm)\.(weight|bias)$"), None, False, False),
    (re.compile(r"\.mlp\.(router\.weight|shared_experts\.gate_weight)$"), None, False, False),
    (re.compile(r"^embedding\.position_embeddings\.weight$"), None, False, False),
)

_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class Partition:
    """How a full tensor is cut over the tensor-parallel ranks."""

    dim: int | None
    """The dimension that is cut; None: every rank holds the whole tensor."""
    gated: bool = False
    """The cut dimension is [gate; up] and each half is cut by itself, so that a rank's gate meets its own up."""
    vocabulary: bool = False
    """Rows are tokens: zero rows are appended until the tensor-parallel size divides their number."""

    def shard(self, full: Tensor, rank: int, size: int, padded_rows: int | None = None) -> Tensor:
        """Rank `rank`'s part of a full tensor.

        Args:
            full: the whole tensor, vocabulary not padded.
            rank: tensor-parallel rank.
            size: tensor-parallel size.
            padded_rows: rows of a vocabulary tensor after padding; required for those.
        """
        if self.vocabulary:
            assert padded_rows is not None and padded_rows >= full.shape[0]
            full = torch.nn.functional.pad(full, (0, 0, 0, padded_rows - full.shape[0]))
        if self.dim is None or size == 1:
            return full
        if self.gated:
            halves = full.chunk(2, self.dim)
            return torch.cat([half.chunk(size, self.dim)[rank] for half in halves], self.dim)
        return full.chunk(size, self.dim)[rank]

    def join(self, shards: list[Tensor], rows: int | None = None) -> Tensor:
        """The full tensor from all shards in rank order; the inverse of `shard`.

        Args:
            shards: one tensor per tensor-parallel rank; a single one for uncut parameters.
            rows: rows of a vocabulary tensor without padding; required for those.
        """
        if self.dim is None:
            return shards[0]
        if self.gated and len(shards) > 1:
            gates, ups = zip(*(shard.chunk(2, self.dim) for shard in shards), strict=True)
            return torch.cat([*gates, *ups], self.dim)
        full = torch.cat(shards, self.dim) if len(shards) > 1 else shards[0]
        if self.vocabulary:
            assert rows is not None
            full = full[:rows]
        return full

    def views(self, full: Tensor, rank: int, size: int, padded_rows: int) -> list[Tensor]:
        """Where a rank's shard lies in a full tensor that is cut: its parts, one after the other along `dim`, are
        copied to these views; rows of padding beyond them have no place.

        Args:
            full: the whole tensor, vocabulary not padded.
            rank: tensor-parallel rank.
            size: tensor-parallel size.
            padded_rows: rows of a vocabulary tensor after padding.
        """
        assert self.dim is not None, "every rank holds all of it"
        if self.vocabulary:
            share = padded_rows // size
            return [full[rank * share : (rank + 1) * share]]
        halves = full.chunk(2, self.dim) if self.gated and size > 1 else [full]
        return [half.chunk(size, self.dim)[rank] for half in halves]


def partition_of(name: str, gated_mlp: bool) -> Partition:
    """The partition of a parameter by its canonical name.

    Args:
        name: canonical name.
        gated_mlp: whether the MLP has a gate (SwiGLU, GeGLU).
    """
    for pattern, dim, gated, vocabulary in _RULES:
        if pattern.search(name):
            return Partition(dim, gated and gated_mlp, vocabulary)
    raise AssertionError(f"no partition rule for parameter {name!r}")


def canonical_name(name: str, num_layers: int, first_expert: int = 0) -> str:
    """The canonical name of a parameter of a DeepSpeed PipelineModule or of `GPT`.

    PipelineModule numbers its layers (0 embedding, 1 ... L transformer layers, L+1 final norm, L+2 head) and keeps tied
    ones apart; `GPT` already uses the canonical prefixes. Megatron-Core numbers the experts of each rank from 0.

    Args:
        name: name in the module.
        num_layers: transformer layers of the model.
        first_expert: number of this rank's first expert among all of a layer.
    """
    name = name.removeprefix("module.").removeprefix("tied_modules.").replace(".block.", ".")
    name = _LOCAL_EXPERT.sub(lambda match: f".experts.{int(match[1]) + first_expert}.", name)
    index, _, rest = name.partition(".")
    if not index.isdigit():
        return name
    position = int(index)
    if position == 0:
        return f"embedding.{rest}"
    if position <= num_layers:
        return f"layers.{position - 1}.{rest}"
    return f"{'final_norm' if position == num_layers + 1 else 'head'}.{rest}"
