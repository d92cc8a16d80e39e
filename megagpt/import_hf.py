"""From a Hugging Face folder to a checkpoint and a run config; one tensor in memory at a time."""

import contextlib
import os
import secrets
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megagpt import __version__
from megagpt.checkpoint.manifest import (
    FORMAT,
    PROBE,
    File,
    Manifest,
    Parameter,
    Piece,
    write_manifest,
)
from megagpt.checkpoint.tensor_file import write_tensors
from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.safetensors_stream import is_finite
from megagpt.convert.writer import BLOCK_BYTES
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConversionError, StorageError
from megagpt.host_tensors import MemoryPool, one_thread
from megagpt.layerwise import LayerwiseGPT
from megagpt.model.partition import partition_of
from megagpt.parallel.cpu_memory import return_freed_memory
from megagpt.parallel.ranks import start_single_process
from megagpt.parallel.rng import rng_state
from megagpt.plan import Plan, deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.pretrained import PretrainedWeights, open_pretrained
from megagpt.storage import Location, RemotePath
from megagpt.storage.local import sync_path
from megagpt.storage.steps import STEP_PREFIX

RANK, CONFIG = "rank-00000.safetensors", "run.yaml"
STEP = f"checkpoints/{STEP_PREFIX}{0:08d}"
PROBE_TOKENS, PROBE_TOLERANCE = 32, 1e-4
KEPT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Import:
    """What `import_checkpoint` made."""

    config: Location
    checkpoint: Location
    family: str
    parameters: int
    weight_bytes: int
    notes: list[str]


def import_checkpoint(
    folder: Path,
    output: Location,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
) -> Import:
    """Write a checkpoint of step 0, from which a run of any layout goes on, and a run config that names it.

    Weights keep the type of their files.

    Args:
        folder: a Hugging Face folder.
        output: a new folder, for run.yaml and checkpoints/; it may be in an object store.
        vocab_size: another number of tokens than the folder's.
        tokenizer: tokenizer of the run; default: the folder's own tokenizer.json if it has one.
        allow_pickle: also take pickled weights, loaded as plain tensors.

    Raises:
        ConfigError: config.json is missing, damaged or of a family that we do not know.
        ConversionError: a file is damaged, tensors are missing, unknown or of another shape, or `output` exists or
            cannot be written.
        DataError: the tokenizer that was given is missing or damaged.
        StorageError: the store refuses or does not answer.
    """
    if isinstance(output, Path):
        output = Path(os.path.abspath(output))
    if os.path.lexists(output) if isinstance(output, Path) else output.exists():
        raise ConversionError(f"{output} exists; give another folder")
    if tokenizer is not None:
        Tokenizer.load(tokenizer)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = str(folder / "tokenizer.json")
    plan = _plan(folder, output, vocab_size, tokenizer)
    weights = open_pretrained(str(folder), plan.model, allow_pickle)
    with one_thread():
        if isinstance(output, RemotePath):
            size = _write_remote(output, weights, plan)
        else:
            size = _write_local(output, weights, plan)
    parameters = sum(prod(shape) for shape in canonical_shapes(plan.model).values())
    return Import(output / CONFIG, output / STEP, weights.weights.family.name, parameters, size, weights.notes)


def _write_local(output: Path, weights: PretrainedWeights, plan: Plan) -> int:
    partial = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
    try:
        (partial / STEP).mkdir(parents=True)
        size = _write_checkpoint(partial / STEP, weights, plan)
        sync_path(partial / STEP)
        (partial / CONFIG).write_text(_run_yaml(plan), encoding="utf-8")
        sync_path(partial / CONFIG)
        os.rename(partial, output)
        sync_path(output.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(f"{output} cannot be written ({error}); make room, or give another folder") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return size


def _write_remote(output: RemotePath, weights: PretrainedWeights, plan: Plan) -> int:
    try:
        size = _write_checkpoint(output / STEP, weights, plan)
        (output / CONFIG).write_bytes(_run_yaml(plan).encode())
    except BaseException:
        with contextlib.suppress(StorageError):
            output.remove_tree()
        raise
    return size


def _plan(folder: Path, output: Location, vocab_size: int | None, tokenizer: str | None) -> Plan:
    model = {"init_from": str(folder)} | ({} if vocab_size is None else {"vocab_size": vocab_size})
    tree = {
        "model": model,
        "data": {} if tokenizer is None else {"tokenizer": os.path.abspath(tokenizer)},
        "training": {"steps": 1},
        "checkpoint": {"directory": str(output / "checkpoints")},
    }
    found = run_config_from_dict(tree).model_dump(mode="json")
    found["model"]["init_from"] = None  # the checkpoint is what a run starts from
    return make_plan(run_config_from_dict(found), deepspeed_config_from_dict({"train_batch_size": 1}), 1)


def _run_yaml(plan: Plan) -> str:
    model = {key: value for key, value in plan.run.model.model_dump(mode="json").items() if value is not None}
    tree = {
        "model": model,
        "data": {"prefix": None, "tokenizer": plan.run.data.tokenizer},
        "training": {"steps": 1000, "seq_length": plan.seq_length},
        "optimizer": {"lr": 2e-5, "min_lr": 2e-6},
        "checkpoint": {"directory": plan.run.checkpoint.directory},
    }
    head = (
        "# Starts from the imported checkpoint of step 0 in checkpoint.directory.\n"
        "# Give data.prefix (written with this tokenizer), and set training and optimizer as you need them.\n"
    )
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _write_checkpoint(step: Location, weights: PretrainedWeights, plan: Plan) -> int:
    """Write all files of the checkpoint; returns the size of the weights."""
    parameters, files = _write_weights(step, weights, plan)
    size = sum(file.bytes for file in files.values())
    files[PROBE] = write_tensors(step / PROBE, _probe(weights, plan))
    files[RANK] = write_tensors(step / RANK, {f"rng/{key}": state for key, state in rng_state().items()})
    manifest = Manifest(
        format=FORMAT,
        megagpt=__version__,
        versions={name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
        step=0,
        samples=0,
        updates=0,
        run=plan.run.model_dump(mode="json"),
        deepspeed=dict(plan.deepspeed.raw),
        world_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        padded_vocab_size=plan.model.vocab_size,
        moments=(),
        parameters=parameters,
        files=files,
        metrics={},
        precision="fp32",
        probe_tolerance=PROBE_TOLERANCE,
    )
    write_manifest(step, manifest)
    return size


def _probe(weights: PretrainedWeights, plan: Plan) -> dict[str, Tensor]:
    """Tokens of a fixed sample, and the logits that exports of later checkpoints are compared with."""
    ranks = start_single_process(plan.run.training.seed)
    return_freed_memory()
    tokens = torch.randint(0, plan.model.vocab_size, (1, plan.seq_length), generator=torch.Generator().manual_seed(0))
    logits = LayerwiseGPT(plan, weights, device=ranks.device).logits(tokens[:, :PROBE_TOKENS])
    return {"tokens": tokens, "logits": logits}


def _write_weights(
    step: Location, weights: PretrainedWeights, plan: Plan
) -> tuple[dict[str, Parameter], dict[str, File]]:
    """Write the weights in the types that they have. Tables of tokens are cut, each part into a file of its own, so
    that memory never holds the whole of one.

    Raises:
        ConversionError: a weight is not finite, or a file cannot be read.
    """
    parameters: dict[str, Parameter] = {}
    spans: list[dict[str, tuple[int, int]]] = []  # per file: entry -> its rows
    for name, shape in canonical_shapes(plan.model).items():
        row = prod(shape[1:])
        is_table = partition_of(name, plan.model.is_gated).vocabulary
        rows = max(1, BLOCK_BYTES // (4 * row)) if is_table else shape[0]
        pieces = []
        for number, first in enumerate(range(0, shape[0], rows)):
            last = min(first + rows, shape[0])
            if number == len(spans):
                spans.append({})
            spans[number][f"weight/{name}"] = (first, last)
            pieces.append(Piece(file=_file(number), tensor_rank=0, start=first * row, stop=last * row))
        parameters[name] = Parameter(shape=shape, pieces=tuple(pieces))

    files, parts = {}, _Parts(weights)
    for number, wanted in enumerate(spans):
        kinds = {entry: parts.kind(_name(entry), *rows) for entry, rows in wanted.items()}

        def make(entry: str, wanted: dict[str, tuple[int, int]] = wanted) -> Tensor:
            return parts.read(_name(entry), *wanted[entry])

        files[_file(number)] = write_tensors(step / _file(number), kinds, make)
    return parameters, files


class _Parts:
    """Rows of weights, flattened, one after the other in the same memory."""

    def __init__(self, weights: PretrainedWeights):
        self._weights, self._memory = weights, MemoryPool()
        self._last = torch.empty(0)

    def kind(self, name: str, first: int, last: int) -> Tensor:
        """A tensor without memory that has the type and shape of what `read` gives."""
        row = self._weights.shape(name)[1:]
        return torch.empty((last - first) * prod(row), dtype=self._dtype(name), device="meta")

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1, valid until the next call.

        Raises:
            ConversionError: a value is not finite, or a file cannot be read.
        """
        self._memory.give_back(self._last)
        shape = self._weights.shape(name)
        self._last = part = self._memory.take((last - first, *shape[1:]), self._dtype(name))
        if last - first < shape[0]:
            self._weights.vocabulary_rows(name, first, last, part)
        else:
            self._weights.full(name, part)
        if not is_finite(part):
            raise ConversionError(f"{self._weights.weights.folder}: {name} has values that are not finite")
        return part.flatten()

    def _dtype(self, name: str) -> torch.dtype:
        """The type that a weight has; fp32 for those of pickle files that no run has, such as float64."""
        dtype = self._weights.dtype(name)
        return dtype if dtype in KEPT_TYPES else torch.float32


def _name(entry: str) -> str:
    return entry.removeprefix("weight/")


def _file(number: int) -> str:
    return f"weights-{number:05d}.safetensors"
