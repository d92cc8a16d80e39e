"""Training starts from a Hugging Face folder on any layout, and goes on from its own checkpoints."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import RankFailedError, run_ranks
from tiny import LLAMA, SGD, tiny_plan, train_quietly

from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.writer import write_hf_folder
from megagpt.plan.config import ModelConfig

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A random model of 290 tokens with a head of its own."""
    model = ModelConfig(**(LLAMA | {"vocab_size": 290, "max_position_embeddings": 32}))
    generator = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in canonical_shapes(model).items()}
    write_hf_folder(tmp_path / "hf", model, weights.__getitem__, weights, None)
    return tmp_path / "hf"


def train_and_listen(plan) -> str:
    """Train, and return what this rank says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train_quietly(plan)
    return said.getvalue()


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "grad_norm" in line]


def plan_from(folder: Path, dataset: dict, runs: Path, steps: int = 3, **layout):
    sections = {
        "model": {"vocab_size": 300, "init_from": str(folder)},
        "data": dataset,
        "checkpoint": {"directory": str(runs / "checkpoints")},
        "logging": {"directory": str(runs), "interval": 1},
    }
    return tiny_plan("llama", SGD, steps=steps, sections=sections, **layout)


def test_any_layout_starts_from_the_folder_and_resumes_from_its_own(folder, dataset, tmp_path):
    [said] = run_ranks(train_and_listen, 1, plan_from(folder, dataset, tmp_path / "one"))
    assert f"started from {folder} (llama, float32)" in said
    assert "note: 10 new tokens (model.vocab_size=300, 290 there) start at the mean of the others" in said
    run_ranks(train_quietly, 4, plan_from(folder, dataset, tmp_path / "four", tp=2, pp=2, sp=True))
    run_ranks(train_quietly, 2, plan_from(folder, dataset, tmp_path / "zero3", tp=1, dp=2, zero=3))
    expected = losses(tmp_path / "one")
    assert len(expected) == 3
    assert losses(tmp_path / "four") == pytest.approx(expected, abs=1e-5)
    assert losses(tmp_path / "zero3") == pytest.approx(expected, abs=1e-5)
    random = tiny_plan("llama", SGD, steps=1, sections={"model": {"vocab_size": 300}, "data": dataset} | {
        "logging": {"directory": str(tmp_path / "random"), "interval": 1}})  # fmt: skip
    run_ranks(train_quietly, 1, random)
    assert abs(losses(tmp_path / "random")[0] - expected[0]) > 1e-3, "the folder's weights matter"
    more = plan_from(folder, dataset, tmp_path / "four", steps=4)
    shutil.rmtree(folder)
    [said] = run_ranks(train_and_listen, 1, more)
    assert "resumed from" in said
    assert "started from" not in said


def test_a_damaged_folder_stops_all_ranks_with_one_message(folder, dataset, tmp_path):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(RankFailedError) as caught:
        run_ranks(train_quietly, 2, plan_from(folder, dataset, tmp_path / "two", tp=2))
    assert str(caught.value).count("not a whole safetensors file; download or export it again") == 2
