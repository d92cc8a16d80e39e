"""Run transformers' model of a folder with one weight in memory at a time.

The model is built without weights. Before each of its modules that have any runs, they are read from the folder's
safetensors, and dropped afterwards. Of an embedding only the rows that are looked up are read, of the head some rows at
a time. What is read, and that nothing is missing or left over, is decided by the names of transformers' own parameters.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.convert.hf_weights import open_tensors
from megagpt.convert.safetensors_read import Span
from megagpt.errors import ConversionError
from megagpt.host_tensors import MemoryPool

HEAD_BLOCK_BYTES = 32 << 20
"""Size in fp32 of the rows of the head that are held at once."""

Observer = Callable[[int, Tensor, Tensor], None]
"""Gets a layer's number, its input and its output, both [B, S, H]."""


class LayerwiseTransformer:
    """transformers' model of a folder, computing in fp32.

    Args:
        folder: a Hugging Face folder with safetensors.
        memory: where weights get their memory from; default: its own.

    Raises:
        ConversionError: transformers is missing or cannot build the model, a file is damaged, or weights are missing
            or unknown to the model.
    """

    def __init__(self, folder: str | Path, memory: MemoryPool | None = None):
        self._folder = Path(folder)
        if not (self._folder / "config.json").is_file():
            raise ConversionError(f"{folder}: no config.json; give the folder of an export")
        self._tensors, self._memory = open_tensors(self._folder), memory or MemoryPool()
        self._model = self._build()
        self._read = _StoredNames(self._folder, self._model, set(self._tensors))
        head = self._model.get_output_embeddings()
        for name, module in self._model.named_modules():
            if module is head:
                self._run_in_blocks(head, f"{name}.weight")
            elif isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._look_up(f"{name}.weight"))
                module.register_forward_hook(self._drop)
            elif any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._fill(name))
                module.register_forward_hook(self._drop)

    @torch.inference_mode()
    def logits(self, tokens_BS: Tensor, observe: Observer | None = None) -> Tensor:
        """[B, S] token ids -> [B, S, V] in fp32.

        Args:
            observe: told what goes into each layer and what comes out of it.
        """
        handles = []
        for index, layer in enumerate(self._layers() if observe else ()):

            def tell(module: nn.Module, args: tuple, kwargs: dict, output: Any, index: int = index) -> None:
                given = args[0] if args else kwargs["hidden_states"]
                assert observe is not None
                observe(index, given, output if isinstance(output, Tensor) else output[0])

            handles.append(layer.register_forward_hook(tell, with_kwargs=True))
        try:
            return self._model(tokens_BS, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> nn.ModuleList:
        count = self._model.config.num_hidden_layers
        lists = (module for module in self._model.modules() if isinstance(module, nn.ModuleList))
        return next(found for found in lists if len(found) == count)

    def _build(self) -> Any:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ModuleNotFoundError:
            raise ConversionError("checking an export needs transformers; run pip install 'megagpt[hf]'") from None
        try:
            config = AutoConfig.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
            with _weights_on_meta():
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # transformers has no common base
            raise ConversionError(f"{self._folder}: transformers cannot load it: {error}") from error
        return model.eval()

    def _stored(self, name: str, out: Tensor, rows: Span | None = None) -> None:
        """Read a parameter of transformers' model, or rows of it, into a tensor."""
        groups = self._read.places[name]
        wholes = [out] if self._read.is_plain(name) else out.unbind()
        if len(wholes) != len(groups):
            raise self._misshapen(name, [len(groups)], out)
        for whole, group in zip(wholes, groups, strict=True):
            begin = 0
            for stored in group:
                file, entry = self._tensors[stored]
                shape = list(file.shape(entry))
                if rows is not None:
                    shape[0] = rows[1] - rows[0]
                place = whole[begin : begin + shape[0]] if shape else whole
                if list(place.shape) != shape:
                    raise self._misshapen(stored, list(file.shape(entry)), out)
                file.read(entry, rows, out=place)
                begin += shape[0] if shape else 0
            if begin != (len(whole) if whole.dim() else 0):
                raise self._misshapen(name, [begin, *whole.shape[1:]], out)

    def _misshapen(self, name: str, shape: list[int], wanted: Tensor) -> ConversionError:
        return ConversionError(
            f"{self._folder}: {name} has shape {shape} where transformers wants {list(wanted.shape)} in all"
        )

    def _fill(self, prefix: str) -> Callable:
        def fill(module: nn.Module, args: Any) -> None:
            for name, parameter in list(module.named_parameters(recurse=False)):
                weight = self._memory.take(parameter.shape, torch.float32)
                self._stored(f"{prefix}.{name}", weight)
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)

        return fill

    def _drop(self, module: nn.Module, args: Any, output: Any) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            self._memory.give_back(parameter.data)
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    def _look_up(self, name: str) -> Callable:
        def look_up(module: nn.Embedding, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens, places = args[0].unique(return_inverse=True)
            table = torch.empty(len(tokens), module.embedding_dim)
            for row, token in zip(table.split(1), tokens.tolist(), strict=True):
                self._stored(name, row, (token, token + 1))
            module._parameters["weight"] = nn.Parameter(table, requires_grad=False)
            module.padding_idx = None  # of the whole table; it plays no part in looking up
            return (places, *args[1:])

        return look_up

    def _run_in_blocks(self, head: nn.Linear, name: str) -> None:
        count, width = head.weight.shape
        step = max(1, HEAD_BLOCK_BYTES // (4 * width))

        def forward(hidden: Tensor) -> Tensor:
            parts = []
            for first in range(0, count, step):
                span = first, min(first + step, count)
                rows = self._memory.take((span[1] - first, width), torch.float32)
                self._stored(name, rows, span)
                parts.append(F.linear(hidden, rows))
                self._memory.give_back(rows)
            return torch.cat(parts, -1)

        assert head.bias is None
        head.forward = forward


class _StoredNames:
    """Which stored tensors make a parameter of transformers' model; experts are stored one by one.

    Raises:
        ConversionError: weights are missing or unknown to the model.
    """

    def __init__(self, folder: Path, model: Any, stored: set[str]):
        self.places: dict[str, list[list[str]]] = {}
        missing, used = [], set[str]()
        embedding = model.get_input_embeddings().weight
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            candidates = [name] if names[id(parameter)] == name else [name, names[id(parameter)]]
            places = next(filter(None, (_place(n, parameter, stored) for n in candidates)), None)
            if places is None:
                missing.append(name)
                continue
            self.places[name] = places
            used.update(place for group in places for place in group)
        head = model.get_output_embeddings()
        if model.config.tie_word_embeddings and head is not None:
            # Built without weights, the head may not share its parameter yet.
            name = next(n for n, module in model.named_modules() if module is head) + ".weight"
            source = next(n for n, p in model.named_parameters() if p is embedding)
            self.places[name] = self.places.get(source, [])
            missing = [other for other in missing if other != name]
        problems: dict[str, list[str]] = {"missing_keys": sorted(missing), "unexpected_keys": sorted(stored - used)}
        if found := {kind: names for kind, names in problems.items() if names}:
            raise ConversionError(f"{folder}: weights do not match the config: {found}; export it again")

    def is_plain(self, name: str) -> bool:
        """Whether a parameter is stored as it is, not expert by expert."""
        return not name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def _place(name: str, parameter: Tensor, stored: set[str]) -> list[list[str]] | None:
    """Stored tensors of a parameter: an outer list to stack (one entry unless it is of experts), inner ones to join."""
    for candidate in (
        name,
        name.replace("lm_head.", "embed_out."),
        name.replace(".mlp.gate.", ".block_sparse_moe.gate."),
    ):
        if candidate in stored:
            return [[candidate]]
    match = re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)", name)
    if match is None:
        return None
    layer, kind = match.groups()
    for pattern, gate_up, down in (
        (f"{layer}.mlp.experts.{{}}.", ("gate_proj", "up_proj"), ("down_proj",)),
        (f"{layer}.block_sparse_moe.experts.{{}}.", ("w1", "w3"), ("w2",)),
    ):
        parts = gate_up if kind == "gate_up_proj" else down
        places = [[f"{pattern.format(e)}{part}.weight" for part in parts] for e in range(parameter.shape[0])]
        if all(place in stored for group in places for place in group):
            return places
    return None


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory; their buffers are real, as nobody would fill them later."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
