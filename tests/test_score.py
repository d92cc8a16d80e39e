"""The loss of a checkpoint on held-out text: every sample once, the same in any layout, right to the formula."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import in_own_process, run_ranks

from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.plan.evaluation import evaluation_plan, read_saved_run

ROOT = Path(__file__).parents[1]


def score(checkpoints: Path, overrides: tuple[str, ...] = (), **options) -> list:
    """On this rank, as the command does it."""
    from megagpt.parallel.launch import detect_launch
    from megagpt.score import score_checkpoint

    launch, saved = detect_launch(), read_saved_run(checkpoints)
    plan = evaluation_plan(saved, launch.world_size, overrides)
    return score_checkpoint(plan, launch, saved.folder, **options)


def by_hand(checkpoints: Path, split: str) -> tuple[float, int]:
    """Mean of -log p over all samples of a split, one by one in one process."""
    import torch
    from torch.nn.functional import cross_entropy

    from megagpt.data.run_data import open_data
    from megagpt.generate import load_model, model_logits

    model, reader = load_model(checkpoints)
    run = reader.run
    data = open_data(run.data, run.model.vocab_size, run.training.seq_length, run.training.seed)
    stream = getattr(data, split)[0].stream
    losses = []
    for index in range(len(stream)):
        tokens = torch.from_numpy(stream.sample(index))
        logits_BSV = model_logits(model, tokens[None, :-1], run.model.vocab_size)
        losses.append(float(cross_entropy(logits_BSV[0], tokens[1:])))
    return sum(losses) / len(losses), len(losses)


@pytest.fixture(scope="module")
def expected(trained) -> dict[str, tuple[float, int]]:
    checkpoints = trained("llama")
    return {split: run_ranks(by_hand, 1, checkpoints, split)[0] for split in ("validation", "test")}


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, ()),  # the whole model on each rank
        (4, ()),  # TP 2 x PP 2, as trained
        (4, ("parallel.context_parallel_size=2", "parallel.pipeline_model_parallel_size=1")),
    ],
)
def test_every_layout_gives_the_mean_over_all_samples(trained, expected, world_size, overrides) -> None:
    scores = run_ranks(score, world_size, trained("llama"), overrides)
    for found in scores:
        assert [part.split for part in found] == ["validation", "test"]
        for part in found:
            loss, samples = expected[part.split]
            assert part.loss == pytest.approx(loss, rel=1e-6)
            assert part.samples == samples
            assert part.tokens % samples == 0


def test_given_datasets_and_a_number_of_samples(trained, dataset) -> None:
    (found,) = run_ranks(score, 1, trained("llama"), (), datasets=(dataset["prefix"],), most_samples=5)
    (part,) = found
    assert (part.split, part.dataset, part.samples) == (None, dataset["prefix"], 5)


def test_the_plan_keeps_nothing_for_training(trained) -> None:
    saved = read_saved_run(trained("llama"))
    plan = evaluation_plan(saved, 4)
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size, plan.run.optimizer.name) == (2, 2, "sgd")
    assert evaluation_plan(saved, 3).data_parallel_size == 3
    assert read_saved_run(saved.folder) == saved
    with pytest.raises(ConfigError, match="world size 4 is not a multiple"):
        evaluation_plan(saved, 4, ["parallel.tensor_model_parallel_size=3"])
    with pytest.raises(ConfigError, match="override 'x' is not of the form"):
        evaluation_plan(saved, 4, ["x"])


@in_own_process
def test_what_cannot_be_evaluated_is_named(trained, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        read_saved_run(tmp_path)
    with pytest.raises(DataError, match=r"nothing.* cannot be read|nothing.*not"):
        score(trained("llama"), datasets=(str(tmp_path / "nothing"),))
    with pytest.raises(DataError, match="has no text for validation or test"):
        score(trained("llama"), ("data.split=[1,0,0]",))


def test_the_command_writes_json(trained, tmp_path) -> None:
    command = [sys.executable, "tools/evaluate.py", "--checkpoint", str(trained("llama")), "--split", "test"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "a" / "found.json"), "--max-samples", "3"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads((tmp_path / "a" / "found.json").read_text())
    (part,) = found["results"]
    assert (found["layout"]["world_size"], part["split"], part["samples"]) == (1, "test", 3)
    assert f"loss {part['loss']:.6f}" in result.stdout
    refused = subprocess.run(
        [*command, "--data", "x"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert refused.stderr == "error: --split and --data exclude each other: given datasets are evaluated as a whole\n"
