"""Start a run from the weights of a Hugging Face folder, on any layout: each rank reads the parts that it holds."""

import contextlib
from collections.abc import Generator
from typing import Any, Protocol

import torch
from torch import Tensor

from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.hf_weights import HfWeights
from megagpt.errors import ConversionError, MegagptError
from megagpt.model.partition import Partition, partition_of
from megagpt.parallel.console import Console
from megagpt.parallel.ranks import Ranks
from megagpt.plan import Plan
from megagpt.plan.config import ModelConfig


class StartedModel(Protocol):
    """What is needed of an engine."""

    parameters: dict[str, Any]

    def fragments(self) -> list[Any]: ...
    def groups_in_memory(self, change: bool = False) -> Generator[list[Any], None, None]: ...
    def load_weight(self, name: str, shard: Tensor) -> None: ...


class PretrainedWeights:
    """The weights of a folder as those of a run's model, whose vocabulary may have another size.

    Rows of new tokens start as the mean of all others; rows beyond a smaller vocabulary are left out.

    Args:
        weights: the folder's weights.
        model: the run's model.

    Raises:
        ConversionError: the two differ in more than the vocabulary.
    """

    def __init__(self, weights: HfWeights, model: ModelConfig):
        self.weights, self.model = weights, model
        self._shapes = canonical_shapes(model)
        there = canonical_shapes(weights.model)
        if differing := [
            name
            for name in {**self._shapes, **there}
            if self._shapes.get(name, ())[1:] != there.get(name, ())[1:]
            or (self._shapes[name] != there[name] and not partition_of(name, model.is_gated).vocabulary)
        ]:
            raise ConversionError(
                f"{weights.folder}: {', '.join(differing[:6])} of its model have another shape in this run; "
                "give the model's own keys"
            )

    @property
    def notes(self) -> list[str]:
        """What differs from the folder, one sentence each."""
        there, here = self.weights.model.vocab_size, self.model.vocab_size
        if there < here:
            return [
                f"{here - there} new tokens (model.vocab_size={here}, {there} there) start at the mean of the others"
            ]
        if there > here:
            return [f"the last {there - here} of {there} tokens are left out (model.vocab_size={here})"]
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, vocabulary not padded."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The type that a parameter is stored in."""
        return self.weights.dtype(name)

    def full(self, name: str, out: Tensor | None = None) -> Tensor:
        """A whole parameter, vocabulary not padded.

        Args:
            name: canonical name.
            out: contiguous tensor of its shape and any type to read into; default: a new one of the stored type.

        Raises:
            ConversionError: a file cannot be read.
        """
        if partition_of(name, self.model.is_gated).vocabulary:
            return self.vocabulary_rows(name, 0, self.model.vocab_size, out)
        return self.weights.read(name, out=out)

    def shard(self, name: str, tensor_rank: int, tensor_size: int, padded_vocab_size: int) -> Tensor:
        """One rank's tensor-parallel shard; only its part of the files is read.

        Raises:
            ConversionError: a file cannot be read.
        """
        partition = partition_of(name, self.model.is_gated)
        if partition.dim is None:
            return self.weights.read(name)
        if partition.vocabulary:
            share = padded_vocab_size // tensor_size
            return self.vocabulary_rows(name, tensor_rank * share, (tensor_rank + 1) * share)
        if partition.dim == 1:
            width = self._shapes[name][1] // tensor_size
            return self.weights.read(name, columns=(tensor_rank * width, (tensor_rank + 1) * width))
        rows = Partition(0, partition.gated).shard(torch.arange(self._shapes[name][0]), tensor_rank, tensor_size)
        return self.weights.read(name, rows)

    def vocabulary_rows(self, name: str, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Rows of an embedding or head: those of the folder, means for new tokens, zeros for padding.

        Args:
            name: canonical name.
            first: first token.
            last: one past the last token.
            out: as for `full`.
        """
        stored, wanted = self.weights.model.vocab_size, self.model.vocab_size
        rows = torch.empty(last - first, self._shapes[name][1], dtype=self.dtype(name)) if out is None else out
        known = range(min(first, stored, wanted), min(last, stored, wanted))
        self.weights.read(name, torch.arange(known.start, known.stop), out=rows[: len(known)])
        new = max(0, min(last, wanted) - max(first, stored))
        if new:
            mean = self.weights.mean_row(name).to(self.dtype(name))
            rows[len(known) : len(known) + new] = mean
        rows[len(known) + new :] = 0
        return rows


def open_pretrained(folder: str, model: ModelConfig, allow_pickle: bool = False) -> PretrainedWeights:
    """The weights of a Hugging Face folder as those of `model`.

    Raises:
        ConfigError: config.json is missing, damaged or of a family that we do not know.
        ConversionError: a file is damaged, or tensors are missing, unknown or of another shape.
    """
    return PretrainedWeights(HfWeights(folder, allow_pickle), model)


def load_pretrained(plan: Plan, engine: StartedModel, ranks: Ranks, console: Console) -> None:
    """Replace the initial weights of a fresh run by those of `model.init_from`; collective.

    Raises:
        ConversionError: on all ranks, if one cannot read its part.
    """
    folder = plan.model.init_from
    assert folder is not None
    problem: MegagptError | None = None
    try:
        weights = open_pretrained(folder, plan.model)
        with torch.no_grad():
            _load(weights, plan, engine, ranks)
    except MegagptError as error:
        problem = error
    found = [str(problem) for problem in ranks.gather_objects(problem and str(problem)) if problem]
    if found:
        raise ConversionError(found[0])
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in weights.weights.dtypes))
    console.say(f"started from {folder} ({weights.weights.family.name}, {dtypes})")
    for note in weights.notes:
        console.say(f"note: {note}")


def _load(weights: PretrainedWeights, plan: Plan, engine: StartedModel, ranks: Ranks) -> None:
    def load(name: str) -> Tensor:
        shard = weights.shard(name, ranks.tensor_rank, ranks.tensor_size, plan.padded_vocab_size)
        engine.load_weight(name, shard)
        return shard.flatten()

    with contextlib.closing(engine.groups_in_memory(change=True)) as groups:
        for fragment in (fragment for group in groups for fragment in group):
            fragment.master.copy_(load(fragment.name)[fragment.start : fragment.stop])
    owned = {fragment.name for fragment in engine.fragments()}
    for name in engine.parameters:
        if name not in owned:  # other ranks update it
            load(name)
