"""The weights of a Hugging Face folder under canonical names: whole, or the rows and columns that a rank needs."""

import functools
import itertools
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megagpt.convert.canonical import canonical_shapes, shorten
from megagpt.convert.family import Family
from megagpt.convert.safetensors_read import SafetensorsFile, Span
from megagpt.convert.tables import FAMILIES
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig
from megagpt.plan.hf_config import read_hf_model

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = (("pytorch_model*.bin",), ("*.pt", "*.pth", "consolidated*.bin"))
"""The latter only without the former: beside the weights that the Trainer saves lie optimizer.pt and others."""
# Masks and frequencies that earlier versions of transformers saved; they are computed, not learnt.
_BUFFERS = re.compile(r"(\.attn\.bias|\.attention\.bias|\.masked_bias|rotary_emb\.inv_freq)$")
_BASES = ("model", "transformer", "gpt_neox")
BLOCK_BYTES = 16 << 20
"""Rows that are only looked through are read in pieces of about this size."""


class Tensors(Protocol):
    """Tensors of one file."""

    tensors: Any

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(
        self, name: str, rows: Span | None = None, columns: Span | None = None, out: Tensor | None = None
    ) -> Tensor: ...


class _PickledTensors:
    """Tensors of a file that torch has pickled; loaded with `weights_only`, which runs no code."""

    def __init__(self, path: Path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # files of torch before 1.6 cannot be mapped
                    loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling finds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConversionError(f"{path}: does not hold plain tensors, or is damaged: {reason}") from None
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise ConversionError(f"{path}: does not hold names and tensors only")
        self.tensors = loaded

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(
        self, name: str, rows: Span | None = None, columns: Span | None = None, out: Tensor | None = None
    ) -> Tensor:
        tensor = self.tensors[name] if rows is None else self.tensors[name][slice(*rows)]
        part = tensor if columns is None else tensor[:, slice(*columns)]
        return part.clone() if out is None else out.copy_(part)


def open_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, tuple[Tensors, str]]:
    """All tensors of a folder: name -> file, and the name there.

    Raises:
        ConversionError: there are none, or a file or the index is damaged.
    """
    if (folder / _INDEX).is_file():
        return _open_indexed(folder)
    paths = [folder / _SINGLE] if (folder / _SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    files: list[Tensors] = [SafetensorsFile(path) for path in paths]
    if not files:
        kinds = (sorted({path for pattern in kind for path in folder.glob(pattern)}) for kind in _PICKLES)
        pickles = next(filter(None, kinds), [])
        if not pickles:
            raise ConversionError(f"{folder}: has no *.safetensors files; give the folder of a Hugging Face model")
        if not allow_pickle:
            raise ConversionError(
                f"{folder}: its weights are pickle files ({shorten([path.name for path in pickles], 3)}), which can "
                "run code when they are loaded; take the model's safetensors, or convert it with "
                "tools/convert_from_hf.py --allow-pickle, which loads plain tensors only"
            )
        files = [_PickledTensors(path) for path in pickles]
    found: dict[str, tuple[Tensors, str]] = {}
    for file in files:
        for name in file.tensors:
            if name in found:
                raise ConversionError(f"{folder}: {name} is in two files; remove those that do not belong to the model")
            found[name] = (file, name)
    return found


def _open_indexed(folder: Path) -> dict[str, tuple[Tensors, str]]:
    path = folder / _INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        placed = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path}: is not an index of weights ({error!r}); download or export it again") from None
    files = dict[str, SafetensorsFile]()
    for file in sorted(set(placed.values())):
        if Path(file).name != file:
            raise ConversionError(f"{path}: names {file!r}, which lies outside the folder")
        files[file] = SafetensorsFile(folder / file)
    if missing := [name for name, file in placed.items() if name not in files[file].tensors]:
        raise ConversionError(f"{path}: {shorten(missing)} are not in the files that it names; download it again")
    stored = [name for file in files.values() for name in file.tensors]
    if extra := [name for name in stored if name not in placed]:
        raise ConversionError(f"{path}: does not name {shorten(extra)}, which its files hold; download it again")
    return {name: (files[file], name) for name, file in placed.items()}


class HfWeights:
    """The weights of a folder, every tensor accounted for and of the right shape.

    Args:
        folder: a Hugging Face folder.
        allow_pickle: also take pickled weights, loaded as plain tensors.

    Raises:
        ConfigError: config.json is missing, damaged or of a family that we do not know.
        ConversionError: a file is damaged, or tensors are missing, unknown or of another shape; all are named.
    """

    def __init__(self, folder: str | Path, allow_pickle: bool = False):
        self.folder = Path(folder)
        name, keys = read_hf_model(self.folder)
        self.model = ModelConfig.model_validate(keys)
        """The folder's model, with the vocabulary of its files."""
        self.family = _family(name, self.model, self.folder)
        self._heads: list[tuple[Tensors, str]] = []
        """Copies of a tied head."""
        self._tensors = self._known(open_tensors(self.folder, allow_pickle))
        self._check()

    def _known(self, stored: dict[str, tuple[Tensors, str]]) -> dict[str, tuple[Tensors, str]]:
        """Without buffers and without the copy of a tied head, under the names of a whole model."""
        wanted = self.family.sources(self.model)
        found = {name: place for name, place in stored.items() if not _BUFFERS.search(name) or name in wanted}
        if not self.model.untie_embeddings_and_output_weights:
            self._heads = [found.pop(head) for head in ("lm_head.weight", "embed_out.weight") if head in found]
        base = next(iter(wanted)).partition(".")[0]
        if base in _BASES and not any(name.startswith(f"{base}.") for name in found):  # saved without the head's class
            found = {n if n in wanted else f"{base}.{n}": place for n, place in found.items()}
        if self.family.name == "gpt_neox":  # some versions of transformers save it under the name of their module
            found = {"embed_out.weight" if n == "lm_head.weight" else n: place for n, place in found.items()}
        return found

    def _check(self) -> None:
        sources, problems = self.family.sources(self.model), []
        if missing := [name for name in sources if name not in self._tensors]:
            problems.append(f"lacks {shorten(missing)}")
        if unknown := [name for name in self._tensors if name not in sources]:
            problems.append(f"has {shorten(unknown)}, which a {self.family.name} model of its config.json has not")
        shapes = {name: file.shape(stored) for name, (file, stored) in self._tensors.items() if name in sources}
        if wrong := [
            f"{name} has shape {list(shape)} where config.json says {list(sources[name].shape)}"
            for name, shape in shapes.items()
            if shape != sources[name].shape
        ]:
            problems.append(shorten(wrong, 6))
        if problems:
            raise ConversionError(f"{self.folder}: {'; '.join(problems)}")
        for name, (file, stored) in self._tensors.items():
            if not file.dtype(stored).is_floating_point:
                raise ConversionError(f"{self.folder}: {name} is stored as {file.dtype(stored)}, not as floating point")
        for name, source in sources.items():
            if source.canonical is None and bool(self._read(name).any()):
                raise ConversionError(
                    f"{self.folder}: {name} is not zero; a bias in the output projection without one in the MLP is not "
                    "supported"
                )
        for head in self._heads:
            self._require_tied(*head)

    def _require_tied(self, file: Tensors, stored: str) -> None:
        """See that the copy of a tied head is one: transformers 5 takes a head that differs, earlier versions do not.

        Raises:
            ConversionError: it is not.
        """
        embedding, place = self._tensors[next(iter(self.family.sources(self.model)))]
        count, width = embedding.shape(place)
        step = max(1, BLOCK_BYTES // (4 * width))
        spans = [(first, min(first + step, count)) for first in range(0, count, step)]
        if file.shape(stored) == (count, width) and all(
            torch.equal(file.read(stored, span).float(), embedding.read(place, span).float()) for span in spans
        ):
            return
        raise ConversionError(
            f"{self.folder}: config.json has tie_word_embeddings=true, but {stored} is not the embedding; set it to "
            f"false there to keep that head, or remove {stored} from the files"
        )

    def _read(
        self, name: str, rows: Span | None = None, columns: Span | None = None, out: Tensor | None = None
    ) -> Tensor:
        file, stored = self._tensors[name]
        return file.read(stored, rows, columns, out)

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the layers."""
        return list(canonical_shapes(self.model))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Types that tensors are stored in."""
        return {file.dtype(stored) for file, stored in self._tensors.values()}

    def dtype(self, canonical: str) -> torch.dtype:
        """Type that a canonical tensor is given in: one that holds the values of all its parts."""
        names = [name for name, _ in self.family.parts_of(canonical, self.model)]
        return functools.reduce(
            torch.promote_types, (file.dtype(stored) for file, stored in map(self._tensors.__getitem__, names))
        )

    def read(
        self, canonical: str, rows: Tensor | None = None, columns: Span | None = None, out: Tensor | None = None
    ) -> Tensor:
        """A canonical tensor of the folder's model, or a part of it.

        Args:
            canonical: a name of `names`.
            rows: which rows, as int64 indices in the order wanted; None: all.
            columns: which columns, for matrices; None: all.
            out: contiguous tensor of that shape and any type to read into; default: a new one of `dtype(canonical)`.

        Raises:
            ConversionError: the name is unknown, or a file cannot be read.
        """
        parts = self.family.parts_of(canonical, self.model)
        reshaping, is_matrix = parts[0][1].reshaping, len(parts[0][1].shape) == 2
        transposes = reshaping.transposes and is_matrix
        sizes = [source.shape[-1 if transposes else 0] for _, source in parts]
        starts = [sum(sizes[:part]) for part in range(len(sizes) + 1)]
        # Which of the parts' rows, one part after the other, each canonical row is.
        numbers = reshaping.join(self.model, tuple(torch.arange(a, a + n) for a, n in zip(starts, sizes, strict=False)))
        if rows is not None:
            numbers = numbers[rows]
        if out is None:
            rest = canonical_shapes(self.model)[canonical][1:]
            shape = (len(numbers), *rest) if columns is None else (len(numbers), columns[1] - columns[0])
            out = torch.empty(shape, dtype=self.dtype(canonical))
        assert len(out) == len(numbers), canonical
        done = 0
        for first, last in _runs(numbers, starts):
            part = next(p for p in range(len(sizes)) if starts[p] <= first < starts[p + 1])
            span, name = (first - starts[part], last - starts[part]), parts[part][0]
            place = out[done : done + last - first]
            if transposes:
                place.copy_(self._read(name, columns, span).t())
            else:
                self._read(name, span, columns, place)
            done += last - first
        return out

    def mean_row(self, canonical: str) -> Tensor:
        """Mean of all rows in fp32, read in pieces: where the row of a new token starts. Random ones would often be
        likelier than all known tokens (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
        """
        count, width = canonical_shapes(self.model)[canonical]
        step = max(1, BLOCK_BYTES // (4 * width))
        total = torch.zeros(width, dtype=torch.float64)
        for first in range(0, count, step):
            total += self.read(canonical, torch.arange(first, min(first + step, count))).double().sum(0)
        return (total / count).float()


def _runs(numbers: Tensor, starts: list[int]) -> Iterable[Span]:
    """Spans of consecutive numbers that stay within one part."""
    if not len(numbers):
        return
    breaks = (numbers[1:] != numbers[:-1] + 1) | torch.isin(numbers[1:], torch.tensor(starts))
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(numbers)]
    for begin, end in itertools.pairwise(edges):
        yield int(numbers[begin]), int(numbers[end - 1]) + 1


def _family(name: str, model: ModelConfig, folder: Path) -> Family:
    family = next(family for family in FAMILIES if family.name == name)
    if obstacles := family.obstacles(model):
        raise ConversionError(f"{folder}: is not a {name} model that we can express: {'; '.join(obstacles)}")
    return family
