"""The rows of the table of verified layouts: which models, layouts, engines, precisions and optimizers are compared
with one process. No torch here.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megagpt.plan import Plan
from megagpt.verify.shrink import CUT_EVERYTHING
from megagpt.verify.small_plans import ADAM, SGD, small_plan

MAX_RANKS = 4

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = {**OFFLOAD, "offload_param": {"device": "cpu"}}
ONE_BY_ONE = {"use_multi_rank_bucket_allreduce": False}
FULL = {"recompute_granularity": "full"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    topic: str
    """Heading under which it stands."""
    model: str
    """A key of MODELS or SHAPES."""
    optimizer: str
    """sgd (rate 0.5, clipping at 0.5) or adamw (clipping at 0.5)."""
    layout: dict[str, Any]
    """Arguments of `small_plan`; `partition`, `zero_keys`, `length` and `rate` are short for what they set."""

    def plan(self) -> Plan:
        """The run that is measured."""
        arguments = dict(self.layout)
        zero_keys = arguments.pop("zero_keys", {})
        if arguments.get("zero") == 3:
            zero_keys = {**CUT_EVERYTHING, **zero_keys}  # or nothing of a small model would be cut
        parallel = {"pipeline_partition": arguments.pop("partition", "uniform")}
        if "dispatcher" in arguments:
            parallel["moe_token_dispatcher_type"] = arguments.pop("dispatcher")
        sections: dict[str, Any] = {"parallel": parallel}
        if "length" in arguments:
            sections["model"] = {"max_position_embeddings": arguments.pop("length")}
        deepspeed: dict[str, Any] = {"zero_optimization": zero_keys}
        if "batch" in arguments:
            deepspeed["train_batch_size"] = arguments.pop("batch")
        if arguments.get("precision") == "fp16":
            deepspeed["fp16"] = {"initial_scale_power": 8}  # none of the steps is to be skipped
        optimizer = SGD if self.optimizer == "sgd" else ADAM
        if "rate" in arguments:
            optimizer = optimizer | dict.fromkeys(("lr", "min_lr"), arguments.pop("rate"))
        return small_plan(self.model, optimizer, sections=sections, deepspeed=deepspeed, **arguments)

    @property
    def precision(self) -> str:
        """Of the forward and backward passes."""
        return str(self.layout.get("precision", "fp32"))

    @property
    def ranks(self) -> str:
        """Parallel sizes in words."""
        sizes = {name.upper(): self.layout.get(name, 1) for name in ("tp", "pp", "cp", "dp", "ep")}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.layout.get("sp"):
            words.insert(1, "SP")
        return " ".join(words) or "1 rank"

    @property
    def engine(self) -> str:
        """Which engine of DeepSpeed runs it, and its ZeRO stage."""
        return f"{'pipeline' if self.layout.get('pp', 1) > 1 else 'plain'}, ZeRO {self.layout.get('zero', 1)}"

    @property
    def options(self) -> str:
        """Everything else."""
        known = {"tp", "pp", "cp", "dp", "ep", "sp", "zero", "precision"}
        words = []
        for key, value in self.layout.items():
            if key == "partition":
                words.append(f"stages {value}" if isinstance(value, str) else f"stages of {'+'.join(map(str, value))}")
            elif key == "recompute":
                words.append("recompute " + " ".join(_option(*item) for item in value.items()))
            elif key == "zero_keys":
                words.append(" ".join(_option(*item) for item in value.items()))
            elif key not in known:
                words.append(f"{key} {value}")
        return ", ".join(words)

    @property
    def key(self) -> str:
        """The whole row in words; no two rows have the same."""
        return " | ".join((self.model, self.optimizer, self.precision, self.ranks, self.engine, self.options))


def _option(key: str, value: Any) -> str:
    if key in ("offload_optimizer", "offload_param"):
        return key
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return str(value) if key.startswith("recompute_") else f"{key} {value}"


def _products(model: str) -> Iterator[Row]:
    """Everything that TP, SP, PP, DP and ZeRO give on up to four ranks."""
    for tp, pp, dp in itertools.product((1, 2, 4), repeat=3):
        if tp * pp * dp > MAX_RANKS:
            continue
        for sp in (False, True)[: 1 if tp == 1 else 2]:
            stages = (1,) if pp > 1 else (1, 2, 3) if dp > 1 else (1, 3) if tp == 2 else (1,)
            for zero in stages:
                sizes = {"tp": tp, "pp": pp, "dp": dp}
                layout = {key: size for key, size in sizes.items() if size > 1}
                layout |= {"sp": True} if sp else {}
                layout |= {"zero": zero} if zero > 1 else {}
                yield Row(f"Products, {'tied' if model.endswith('tied') else 'untied'}", model, "sgd", layout)


def _rows(topic: str, *cases: tuple[str, str, dict[str, Any]]) -> Iterator[Row]:
    for model, optimizer, layout in cases:
        yield Row(topic, model, optimizer, layout)


ROWS: tuple[Row, ...] = (
    *_products("llama"),
    *_products("llama-tied"),
    *_rows(
        "Adam",
        ("llama", "adamw", {}),
        ("llama", "adamw", {"tp": 2, "pp": 2}),
        ("llama", "adamw", {"tp": 2, "sp": True, "dp": 2, "zero": 3}),
        ("llama", "adamw", {"pp": 2, "dp": 2}),
        ("llama", "adamw", {"dp": 4, "zero": 2}),
        ("llama-tied", "adamw", {"tp": 2, "sp": True, "pp": 2}),
        ("llama-tied", "adamw", {"pp": 4}),
        ("gpt2", "adamw", {"tp": 2, "pp": 2}),
    ),
    *_rows(
        "Shapes that do not fit at first sight",
        ("odd", "sgd", {"pp": 2}),
        ("odd", "sgd", {"pp": 2, "partition": "parameters"}),
        ("odd", "sgd", {"tp": 3}),
        ("odd", "sgd", {"pp": 3}),
        ("odd-tied", "sgd", {"pp": 2, "rate": 0.1}),
        ("odd-tied", "adamw", {"pp": 2, "partition": "parameters"}),
        ("odd-tied", "adamw", {"pp": 3}),
        ("9-heads", "sgd", {"tp": 3, "sp": True, "length": 30}),
        ("9-heads", "sgd", {"cp": 3, "length": 30}),
        ("9-heads", "sgd", {"dp": 3, "zero": 2, "batch": 12}),
        ("9-heads", "sgd", {"dp": 3, "zero": 3, "batch": 12}),
        ("vocabulary-50257", "sgd", {"tp": 2, "pp": 2}),
        ("vocabulary-50257", "adamw", {"dp": 2, "zero": 3}),
        ("vocabulary-50257-tied", "sgd", {"tp": 2, "sp": True, "pp": 2}),
        ("vocabulary-50257-tied", "sgd", {"pp": 2, "dp": 2}),
        ("one-group", "sgd", {"tp": 2}),
        ("one-group", "sgd", {"tp": 2, "sp": True}),
        ("one-group", "adamw", {"tp": 2, "sp": True, "pp": 2}),
        ("one-group", "sgd", {"tp": 2, "dp": 2, "zero": 3}),
        ("one-group", "sgd", {"tp": 4}),
        ("two-groups", "sgd", {"tp": 4}),
        ("two-groups", "sgd", {"tp": 4, "sp": True}),
        ("5-layers", "sgd", {"pp": 4, "partition": (1, 1, 2, 1)}),
        ("5-layers", "adamw", {"pp": 4, "partition": (1, 2, 2, 0)}),
        ("5-layers-tied", "sgd", {"pp": 4, "partition": (1, 1, 2, 1)}),
        ("5-layers-tied", "sgd", {"tp": 2, "pp": 2, "partition": (5, 0)}),
    ),
    *_rows(
        "Families",
        ("gpt2", "sgd", {"tp": 2, "pp": 2}),
        ("gpt2", "sgd", {"tp": 2, "sp": True, "pp": 2}),
        ("gpt2", "sgd", {"tp": 2, "sp": True, "dp": 2, "zero": 3}),
        ("gpt2", "sgd", {"pp": 2, "dp": 2}),
        ("gpt2-untied", "sgd", {"tp": 2, "sp": True, "pp": 2}),
        ("neox", "sgd", {"tp": 2, "pp": 2}),
        ("neox", "sgd", {"tp": 2, "sp": True, "dp": 2, "zero": 2}),
        ("qwen3", "sgd", {"tp": 2, "sp": True, "dp": 2}),
        ("qwen3", "adamw", {"tp": 2, "sp": True, "pp": 2}),
        ("gemma", "sgd", {"tp": 2, "pp": 2}),
        ("gemma", "sgd", {"tp": 2, "sp": True, "dp": 2}),
        ("gemma", "sgd", {"dp": 4, "zero": 3}),
    ),
    *_rows(
        "Context parallel",
        ("llama", "adamw", {"cp": 2}),
        ("llama", "sgd", {"cp": 2, "tp": 2}),
        ("llama", "sgd", {"cp": 2, "tp": 2, "sp": True}),
        ("llama", "sgd", {"cp": 2, "pp": 2}),
        ("llama", "sgd", {"cp": 2, "dp": 2, "zero": 2}),
        ("llama", "sgd", {"cp": 4, "zero": 3}),
        ("llama-tied", "sgd", {"cp": 2, "pp": 2}),
        ("gpt2", "sgd", {"cp": 2, "pp": 2}),
        ("gpt2", "sgd", {"cp": 2, "tp": 2, "sp": True}),
        ("one-group", "sgd", {"cp": 2, "tp": 2}),
        ("neox", "sgd", {"cp": 2}),
        ("qwen3", "sgd", {"cp": 2, "tp": 2, "sp": True}),
        ("gemma", "sgd", {"cp": 2, "pp": 2}),
        ("gemma", "sgd", {"cp": 2, "tp": 2, "sp": True}),
    ),
    *_rows(
        "Experts",
        ("mixtral", "sgd", {"tp": 2, "sp": True}),
        ("mixtral", "sgd", {"dp": 2, "zero": 3}),
        ("mixtral", "adamw", {"dp": 2, "ep": 2}),
        ("mixtral", "sgd", {"dp": 2, "ep": 2, "zero": 2, "dispatcher": "allgather"}),
        ("mixtral", "sgd", {"dp": 4, "ep": 2, "zero": 2}),
        ("mixtral", "sgd", {"dp": 4, "ep": 4}),
        ("mixtral", "sgd", {"tp": 2, "sp": True, "dp": 2, "ep": 2}),
        ("shared_expert", "sgd", {"pp": 2, "dp": 2, "ep": 2}),
        ("shared_expert", "adamw", {"tp": 2, "sp": True, "dp": 2, "ep": 2}),
        ("mixtral", "sgd", {"cp": 2}),
        ("mixtral", "sgd", {"cp": 2, "ep": 2}),
        ("mixtral", "sgd", {"cp": 2, "tp": 2, "sp": True}),
        ("mixtral", "sgd", {"cp": 2, "dp": 2, "ep": 2, "zero": 2}),
        ("mixtral", "sgd", {"cp": 2, "dp": 2, "ep": 4}),
        ("shared_expert", "sgd", {"cp": 2, "pp": 2, "ep": 2}),
        ("mixtral", "sgd", {"dp": 2, "zero": 3, "zero_keys": OFFLOAD_ALL}),
        ("mixtral", "sgd", {"dp": 2, "ep": 2, "zero_keys": OFFLOAD}),
        ("mixtral", "sgd", {"dp": 4, "ep": 2, "zero": 2, "zero_keys": OFFLOAD}),
    ),
    *_rows(
        "Offload and ZeRO++",
        ("gpt2", "sgd", {"tp": 2, "pp": 2, "zero_keys": OFFLOAD}),
        ("gpt2", "adamw", {"pp": 2, "dp": 2, "zero_keys": OFFLOAD}),
        ("llama", "sgd", {"tp": 2, "dp": 2, "zero": 2, "zero_keys": OFFLOAD}),
        ("llama", "sgd", {"tp": 2, "dp": 2, "zero": 3, "zero_keys": OFFLOAD_ALL}),
        ("llama", "sgd", {"cp": 2, "dp": 2, "zero": 2, "zero_keys": OFFLOAD}),
        ("llama", "sgd", {"dp": 4, "zero": 3, "zero_keys": {"zero_hpz_partition_size": 2}}),
        ("llama", "sgd", {"dp": 4, "zero_keys": ONE_BY_ONE}),
        ("llama", "sgd", {"tp": 2, "dp": 2, "zero": 2, "zero_keys": ONE_BY_ONE}),
        ("gpt2", "sgd", {"pp": 2, "dp": 2, "zero_keys": ONE_BY_ONE}),
        ("gpt2", "sgd", {"pp": 2, "dp": 2, "zero_keys": {**OFFLOAD, **ONE_BY_ONE}}),
        ("mixtral", "sgd", {"dp": 4, "ep": 2, "zero": 2, "zero_keys": ONE_BY_ONE}),
    ),
    *_rows(
        "Recomputation",
        ("llama", "sgd", {"tp": 2, "pp": 2, "recompute": FULL}),
        ("llama", "sgd", {"tp": 2, "sp": True, "dp": 2, "zero": 3, "recompute": FULL}),
        ("llama", "sgd", {"cp": 2, "pp": 2, "recompute": FULL}),
        ("llama", "sgd", {"tp": 2, "recompute": {**FULL, "distribute_saved_activations": True}}),
        ("llama", "sgd", {"tp": 2, "pp": 2, "recompute": {**FULL, "offload_saved_activations": True}}),
        ("llama", "sgd", {"pp": 2, "recompute": {**FULL, "recompute_method": "block"}}),
        ("qwen3", "sgd", {"tp": 2, "sp": True, "pp": 2, "recompute": {"recompute_granularity": "selective"}}),
        ("mixtral", "sgd", {"dp": 2, "ep": 2, "recompute": FULL}),
    ),
    *(
        Row("bf16", model, optimizer, {**layout, "precision": "bf16"})
        for model, optimizer, layout in (
            ("llama", "sgd", {}),
            ("llama", "adamw", {"tp": 2, "pp": 2}),
            ("llama", "sgd", {"tp": 2, "sp": True, "pp": 2}),
            ("llama", "sgd", {"pp": 2, "dp": 2}),
            ("llama", "sgd", {"tp": 2, "dp": 2, "zero": 2}),
            ("llama", "adamw", {"tp": 2, "sp": True, "dp": 2, "zero": 3}),
            ("llama", "sgd", {"tp": 2, "pp": 2, "zero_keys": OFFLOAD}),
            ("llama", "sgd", {"tp": 2, "dp": 2, "zero": 3, "zero_keys": OFFLOAD_ALL}),
            ("llama", "sgd", {"tp": 2, "pp": 2, "recompute": FULL}),
            ("llama", "adamw", {"cp": 2, "dp": 2}),
            ("llama", "sgd", {"cp": 2, "tp": 2, "sp": True}),
            ("llama-tied", "sgd", {"tp": 2, "sp": True, "pp": 2}),
            ("llama-tied", "sgd", {"pp": 2, "dp": 2}),
            ("llama-tied", "sgd", {"cp": 2, "pp": 2}),
            ("gpt2", "adamw", {"tp": 2, "sp": True, "pp": 2}),
            ("gpt2", "adamw", {"dp": 4, "zero": 3}),
            ("odd-tied", "adamw", {"pp": 2}),
            ("one-group", "sgd", {"tp": 2, "sp": True}),
            ("vocabulary-50257-tied", "adamw", {"tp": 2, "pp": 2}),
            ("qwen3", "adamw", {"tp": 2, "sp": True, "dp": 2}),
            ("gemma", "adamw", {"tp": 2, "pp": 2}),
            ("gemma", "adamw", {"cp": 2, "dp": 2, "zero": 2}),
            ("mixtral", "adamw", {"dp": 2, "ep": 2, "zero": 2}),
            ("mixtral", "adamw", {"tp": 2, "sp": True, "dp": 2, "ep": 2}),
            ("shared_expert", "adamw", {"pp": 2, "dp": 2, "ep": 2}),
            ("mixtral", "sgd", {"cp": 2, "dp": 2, "ep": 2}),
            ("mixtral", "sgd", {"dp": 2, "ep": 2, "zero_keys": OFFLOAD}),
        )
    ),
    *(
        Row("fp16", model, optimizer, {**layout, "precision": "fp16"})
        for model, optimizer, layout in (
            ("llama", "adamw", {"tp": 2, "pp": 2}),
            ("llama", "sgd", {"tp": 2, "sp": True, "dp": 2, "zero": 2}),
            ("llama", "sgd", {"tp": 2, "dp": 2, "zero": 3}),
            ("llama", "sgd", {"cp": 2, "pp": 2}),
            ("llama-tied", "sgd", {"tp": 2, "sp": True, "pp": 2}),
            ("gpt2", "sgd", {"pp": 2, "dp": 2}),
            ("gpt2", "adamw", {"tp": 2, "pp": 2, "zero_keys": OFFLOAD}),
            ("mixtral", "sgd", {"dp": 2, "ep": 2, "zero": 2}),
            ("shared_expert", "adamw", {"tp": 2, "sp": True, "dp": 2, "ep": 2}),
            ("shared_expert", "adamw", {"pp": 2, "dp": 2, "ep": 2}),
        )
    ),
)
"""All rows, in the order of the document."""
