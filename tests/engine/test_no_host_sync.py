"""Between reports nothing asks the device for a value, but for what is listed here.

On the CPU a value is there at once; on a GPU whoever asks for it waits until all work before it is done. So each
question that a step asks is caught on its way to torch, with the function that asks it.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import SGD, rank_batches, tiny_plan, train_quietly
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("libraries")

ASKING_OPERATORS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
ASKING_METHODS = {"tolist", "numpy", "cpu"}


def asker() -> str:
    """`package file:function` of the innermost frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.name != Path(__file__).name:
            return f"{path.stem}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class Operators(TorchDispatchMode):
    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asks = func.overloadpacket.__name__ in ASKING_OPERATORS
        if func.overloadpacket.__name__ == "index":
            asks = any(index is not None and index.dtype is torch.bool for index in args[1])
        if asks:
            self.found[asker()] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """What reaches no operator on the CPU."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ASKING_METHODS:
            self.found[asker()] += 1
        return func(*args, **(kwargs or {}))


def questions_of_a_step(plan, experts_at_once: bool = False) -> Counter:
    """Who asks for values in the third step, and how often, on this rank."""
    from megagpt.engine import build_engine
    from megagpt.model.grouped_experts import GroupedExperts
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    GroupedExperts.are_grouped = experts_at_once
    batches = [list(rank_batches(plan, ranks.data_rank, step)) for step in range(3)]
    for step in range(2):
        engine.train_step(iter(batches[step]), 0.1)
    found: Counter = Counter()
    with Operators(found), Methods(found):
        engine.train_step(iter(batches[2]), 0.1)
    return found


# DeepSpeed's own, once the last gradient is there: gradients that are no numbers must not reach the weights, and the
# factor of clipping is computed by the host. No option turns them off.
UPDATE = {"is_invalid_grad_norm"}
CLIPPING_BF16 = {"clip_tensors_by_global_norm"}
OVERFLOW_16_BIT = {"has_overflow"}
# Between stages, DeepSpeed sends each tensor-parallel rank a part of the activation with its shape. Without
# (`pipe_partitioned`, `grad_partitioned`: false, as under sequence parallelism) each would be sent all of it.
SHAPES_BETWEEN_STAGES = {"from_meta"}
# Megatron-Core compares the CPU's random state, which no device has to be asked for.
CPU_RANDOM_STATE = {"fork"}
# Experts that are computed one after the other: the host must know how many tokens go to each, to cut them there.
TOKENS_PER_EXPERT = {"forward"}

LAYOUTS = {
    "one rank, bf16": ("llama", dict(precision="bf16"), UPDATE | CLIPPING_BF16),
    "ZeRO 2, bf16": ("llama", dict(dp=2, zero=2, precision="bf16"), UPDATE | OVERFLOW_16_BIT),
    "ZeRO 3": ("llama", dict(dp=2, zero=3), UPDATE),
    "pipeline, TP": ("llama-tied", dict(tp=2, pp=2, precision="bf16"), UPDATE | CLIPPING_BF16 | SHAPES_BETWEEN_STAGES),
    "pipeline, SP": ("gpt2", dict(tp=2, sp=True, pp=2), UPDATE | CPU_RANDOM_STATE),
    "pipeline, fp16": ("llama", dict(pp=2, precision="fp16"), UPDATE | OVERFLOW_16_BIT),
    "experts": ("mixtral", dict(dp=2), UPDATE | TOKENS_PER_EXPERT),
    "experts at once": ("mixtral", dict(dp=2), UPDATE),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_asks_for_nothing_else(layout):
    model, options, allowed = LAYOUTS[layout]
    plan = tiny_plan(model, SGD, steps=3, **options)
    for found in run_ranks(questions_of_a_step, plan.world_size, plan, experts_at_once="at once" in layout):
        askers = {place.split(":")[1] for place in found}
        assert askers <= allowed, found  # versions of the libraries ask less or more
        assert askers >= UPDATE, "questions are caught"


def moves_of_a_step(plan) -> list[str]:
    """Devices to which micro-batches are moved without that the host waits, before DeepSpeed would move them."""
    from megagpt.engine import build_engine
    from megagpt.engine.batches import PreparedBatch
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    moved: list[str] = []
    to = PreparedBatch.to
    PreparedBatch.to = lambda batch, device: moved.append(device.type) or to(batch, device)
    try:
        engine.train_step(rank_batches(plan, ranks.data_rank, 0), 0.1)
    finally:
        PreparedBatch.to = to
    return moved


@pytest.mark.parametrize("options", [{}, {"pp": 2}], ids=str)
def test_micro_batches_reach_the_device_while_the_host_goes_on(options):
    plan = tiny_plan("llama", SGD, steps=1, **options)
    for moved in run_ranks(moves_of_a_step, plan.world_size, plan):
        assert len(moved) == plan.num_microbatches


def questions_of_a_run(plan) -> Counter:
    found: Counter = Counter()
    with Operators(found), Methods(found):
        train_quietly(plan)
    return found


def test_the_loop_asks_once_per_report_and_once_per_update(dataset):
    """The judge's look at loss and norm, too, comes when DeepSpeed has just waited for the norm."""
    sections = {"model": {"vocab_size": 300}, "data": dataset, "logging": {"interval": 4}}
    short, long = (
        run_ranks(questions_of_a_run, 1, tiny_plan("llama", SGD, steps=steps, sections=sections))[0] for steps in (4, 8)
    )
    of_four_steps = long - short  # without what a run does once
    assert of_four_steps.pop("utils:is_invalid_grad_norm") > 0
    assert of_four_steps == {"guard:_loss_and_norm": 4, "metrics:report": 1}
