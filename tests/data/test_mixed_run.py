"""A run on a mixture that changes: losses per dataset, and the very same samples after a resume."""

import json
import shutil

import pytest
from ranks import RankFailedError, run_ranks
from tiny import ADAM, tiny_plan, train_quietly

from megagpt.data.indexed import IndexedWriter
from megagpt.plan.data_config import DataConfig

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """Two datasets of 200 tokens each, in which one token repeats: the loss tells them apart."""
    folder = tmp_path_factory.mktemp("mixed")
    for token, name in ((7, "sevens"), (250, "others")):
        with IndexedWriter(folder / name, 300) as writer:
            for i in range(100):
                writer.add([token] * 20 + [i])
    return [str(folder / name) for name in ("sevens", "others")]


def train_in(folder, prefixes, steps, weight=0.9):
    data = {
        "datasets": [{"prefix": prefixes[0], "weight": weight}, {"prefix": prefixes[1], "weight": 0.1}],
        "stages": [{"from_tokens": 3 * 8 * 32, "weights": {"others": 1.0}}],
        "split": [80, 10, 10],
    }
    sections = {
        "model": {"vocab_size": 300},
        "data": data,
        "training": {"steps": steps, "eval_interval": 3, "eval_batches": 1},
        "checkpoint": {"directory": str(folder / "checkpoints"), "save_interval": 2},
        "logging": {"directory": str(folder), "interval": 1},
        "optimizer": {**ADAM, "lr": 1e-2, "decay_steps": 8},
    }
    run_ranks(train_quietly, 1, tiny_plan("llama", sections=sections))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_per_dataset_and_a_resumed_curriculum(prefixes, tmp_path):
    whole = train_in(tmp_path / "whole", prefixes, 6)
    validation = {split: [r["loss"] for r in whole if r["split"] == split]
                  for split in ("validation", "validation/sevens", "validation/others")}  # fmt: skip
    assert validation["validation"] == validation["validation/others"], "weighed as in the last stage"
    sevens, others = validation["validation/sevens"], validation["validation/others"]
    assert sevens[1] < sevens[0] - 1, "the first stage reads these"
    assert others[1] > sevens[1]
    assert others[2] < others[1] - 1, "the second stage those"
    assert [r["step"] for r in whole if r["split"] == "test/sevens"] == [6]

    train_in(tmp_path / "parts", prefixes, 2)
    parts = train_in(tmp_path / "parts", prefixes, 6)
    losses = [[r["loss"] for r in records if r["split"] == "train"] for records in (whole, parts)]
    assert losses[0] == losses[1]

    with pytest.raises(RankFailedError, match=r"another dataset: data\.datasets=.*'sevens', 'weight': 0\.5"):
        train_in(tmp_path / "parts", prefixes, 8, weight=0.5)


def test_a_stage_may_be_added_behind_what_was_read():
    stage = {"from_tokens": 100, "weights": {"a": 1.0}}
    short, long = ({"datasets": [{"prefix": "x/a"}], "stages": stages} for stages in ([], [stage]))
    assert DataConfig(**short).mixture_until(100) == DataConfig(**long).mixture_until(100)
    assert DataConfig(**short).mixture_until(101) != DataConfig(**long).mixture_until(101)


def test_a_flipped_bit_stops_a_run_that_verifies_checksums(dataset, tmp_path):
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{dataset['prefix']}.{suffix}", tmp_path / f"d.{suffix}")
    content = bytearray((tmp_path / "d.bin").read_bytes())
    content[1000] ^= 1
    (tmp_path / "d.bin").write_bytes(content)
    data = {**dataset, "prefix": str(tmp_path / "d"), "verify_checksums": True}
    with pytest.raises(RankFailedError, match=r"d\.bin has sha256 .*, its manifest says") as failure:
        run_ranks(train_quietly, 2, tiny_plan("llama", dp=2, sections={"model": {"vocab_size": 300}, "data": data}))
    assert str(failure.value).count("DataError: ") >= 2, "on both ranks"
