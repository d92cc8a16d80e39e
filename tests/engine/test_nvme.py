"""An optimizer on a disk: the same curve as in memory, checkpoints of any layout, folders that are removed."""

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_layouts import reference_curves
from tiny import ADAM, LLAMA, SGD, rank_batches, tiny_plan, train_quietly

from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.writer import write_hf_folder
from megagpt.plan.config import ModelConfig

pytestmark = [pytest.mark.usefixtures("libraries"), pytest.mark.timeout(1200)]  # compiling takes minutes

# DeepSpeed leaves in memory what is smaller than 1 MiB. Of this model some sub-groups are larger, on 2 ranks too.
WIDE = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 1000}
SUB_GROUP = 280_000
STEPS = 4


@pytest.fixture(scope="module")
def async_io(libraries) -> None:
    """DeepSpeed's extension, compiled once."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("no libaio with its headers")
    AsyncIOBuilder().load()


def plan_of(optimizer=ADAM, *, on_disk: Path | None = None, checkpoints: Path | None = None, more=None, **layout):
    """A Plan of the wide model; ZeRO 3 with the optimizer on a disk or in host memory, unless `zero` says otherwise."""
    sections = {"model": WIDE}
    if checkpoints is not None:
        sections["checkpoint"] = {"directory": str(checkpoints)}
    section = {"device": "cpu"} if on_disk is None else {"device": "nvme", "nvme_path": str(on_disk), **(more or {})}
    zero = {"sub_group_size": SUB_GROUP, "offload_optimizer": section} if layout.get("zero", 3) == 3 else {}
    layout = {"zero": 3, "steps": STEPS, **layout}
    return tiny_plan("llama", optimizer, sections=sections, deepspeed={"zero_optimization": zero}, **layout)


def curve(plan, save_at: int | None = None, resumes: bool = False) -> tuple[list[tuple], tuple[int, int], list[str]]:
    """On this rank: loss and norm of each step; sub-groups on the disk and all; what is on the disk in the end."""
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    checkpoints = Checkpoints(plan, engine, ranks, Console(ranks.rank))
    state = TrainState()
    if resumes:
        restored = checkpoints.restore_latest()
        assert restored is not None
        state = restored
    values = []
    while state.step < plan.run.training.steps:
        result = engine.train_step(rank_batches(plan, ranks.data_rank, state.step), plan.run.optimizer.lr)
        state = state.advance(plan.global_batch_size, result.skipped)
        values.append((float(result.loss), float(result.grad_norm)))
        if state.step == save_at:
            checkpoints.save(state, {})
    checkpoints.wait()
    fragments, swapped = engine.fragments(), 0
    if engine.optimizer_is_on_disk:
        swapped = sum(map(engine._wrapped.optimizer._swappable_optimizer_subgroup, (f.group for f in fragments)))
    engine.close()
    ranks.barrier()
    section = plan.deepspeed.raw["zero_optimization"].get("offload_optimizer", {})
    left = os.listdir(section["nvme_path"]) if "nvme_path" in section else []
    return values, (swapped, len(fragments)), left


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adamw", "sgd"])
def test_a_disk_changes_no_number(async_io, tmp_path, optimizer):
    in_memory = run_ranks(curve, 2, plan_of(optimizer, dp=2))
    on_disk = run_ranks(curve, 2, plan_of(optimizer, on_disk=tmp_path, dp=2))
    assert [values for values, *_ in on_disk] == [values for values, *_ in in_memory]
    for _, (swapped, fragments), left in on_disk:
        assert 0 < swapped < fragments, "some are too small for the disk"
        assert left == []
    expected = run_ranks(reference_curves, 1, [plan_of(optimizer)])[0][0]
    for values, *_ in on_disk:
        assert [loss for loss, _ in values] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
        assert [norm for _, norm in values] == pytest.approx([norm for _, norm in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "more"),
    [
        ("bf16", {}),
        ("fp16", {}),
        ("bf16", {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}),
    ],
    ids=["bf16", "fp16", "pipelined"],
)
def test_resume_from_a_disk_is_bit_exact(async_io, tmp_path, precision, more):
    plan = plan_of(on_disk=tmp_path, checkpoints=tmp_path / "checkpoints", precision=precision, more=more, dp=2)
    in_memory = run_ranks(curve, 2, plan_of(precision=precision, dp=2))
    undisturbed = run_ranks(curve, 2, plan, save_at=2)
    assert [values for values, *_ in undisturbed] == [values for values, *_ in in_memory]
    resumed = run_ranks(curve, 2, plan, resumes=True)
    assert [values for values, *_ in resumed] == [values[2:] for values, *_ in undisturbed]


def test_a_checkpoint_moves_between_disk_and_memory(async_io, tmp_path):
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    disk.mkdir()
    expected = run_ranks(curve, 2, plan_of(on_disk=disk, checkpoints=folder, dp=2), save_at=2)[0][0][2:]
    for target in ({"tp": 2, "zero": 1}, {"dp": 1, "on_disk": disk}, {"tp": 2, "on_disk": disk}):
        other = plan_of(checkpoints=folder, **target)
        values = run_ranks(curve, other.world_size, other, resumes=True)[0][0]
        assert [loss for loss, _ in values] == pytest.approx([loss for loss, _ in expected], abs=1e-5), target
        assert [norm for _, norm in values] == pytest.approx([norm for _, norm in expected], rel=1e-4), target


def test_a_run_starts_from_pretrained_weights_and_resumes(async_io, dataset, tmp_path):
    model = ModelConfig(**(LLAMA | WIDE | {"vocab_size": 300, "max_position_embeddings": 32}))
    generator = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in canonical_shapes(model).items()}
    write_hf_folder(tmp_path / "hf", model, weights.__getitem__, weights, None)
    (disk := tmp_path / "swap").mkdir()

    def losses(name: str, section: dict, steps: int) -> list[float]:
        sections = {
            "model": WIDE | {"vocab_size": 300, "init_from": str(tmp_path / "hf")},
            "data": dataset,
            "checkpoint": {"directory": str(tmp_path / name / "checkpoints")},
            "logging": {"directory": str(tmp_path / name), "interval": 1},
        }
        zero = {"zero_optimization": {"sub_group_size": 200_000, "offload_optimizer": section}}
        plan = tiny_plan("llama", ADAM, zero=3, dp=2, steps=steps, sections=sections, deepspeed=zero, precision="bf16")
        run_ranks(train_quietly, 2, plan)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "grad_norm" in line]

    expected = losses("memory", {"device": "cpu"}, 4)
    on_disk = {"device": "nvme", "nvme_path": str(disk)}
    assert losses("disk", on_disk, 2) == expected[:2]
    assert losses("disk", on_disk, 4) == expected
    assert os.listdir(disk) == [], "the command removes what it had there"
