"""A run does not silently go on as another one: model, dataset, tokenizer and seed are those of the checkpoint."""

import contextlib
import io
from pathlib import Path

import pytest
from ranks import RankFailedError, run_ranks
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

HASHES = {"dataset": "a" * 64, "tokenizer": "b" * 64}


def plan_in(folder: Path, allow: list[str] | None = None, model: dict | None = None, **training):
    sections = {
        "model": {**(model or {})},
        "checkpoint": {"directory": str(folder), "allow_changes": allow or []},
        "data": {"split": training.pop("split", [90, 5, 5])},
        "training": training,
    }
    return tiny_plan(sections=sections)


def save_or_resume(plan, hashes: dict[str, str], saves: bool = False) -> tuple[int | None, str]:
    """Save at step 1, or the step that is resumed from, and what is said meanwhile."""
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    checkpoints = Checkpoints(plan, build_engine(plan, ranks), ranks, Console(ranks.rank), hashes)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        if saves:
            checkpoints.save(TrainState(step=1, samples=8), {})
            checkpoints.wait()
            return 1, said.getvalue()
        state = checkpoints.restore_latest()
    return (None if state is None else state.step), said.getvalue()


@pytest.fixture(scope="module")
def saved(libraries, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_or_resume, 1, plan_in(folder), HASHES, saves=True)
    return folder


@pytest.mark.parametrize(
    ("kind", "changed", "hashes", "words"),
    [
        ("dataset", {}, {"dataset": "c" * 64}, r"data\.prefix=None has fingerprint cccccccccccc\.\.\. \(there None"),
        ("tokenizer", {}, {"tokenizer": "c" * 64}, r"data\.tokenizer=None has fingerprint cccccccccccc"),
        (
            "dataset",
            {"split": [80, 10, 10]},
            {},
            r"data\.split=\[80\.0, 10\.0, 10\.0\] \(there",
        ),
        ("dataset", {"seq_length": 16}, {}, r"training\.seq_length=16 \(there 32\)"),
        ("seed", {"seed": 7}, {}, r"training\.seed=7 \(there 1234\)"),
        ("model", {"model": {"rotary_base": 500.0}}, {}, r"model\.rotary_base=500\.0 \(there 10000\.0\)"),
    ],
    ids=["dataset", "tokenizer", "split", "seq_length", "seed", "model"],
)
def test_a_change_is_refused_with_the_difference_unless_allowed(saved, kind, changed, hashes, words):
    with pytest.raises(RankFailedError, match=rf"belongs to another {kind}: {words}.*allow_changes=\[{kind}\]"):
        run_ranks(save_or_resume, 1, plan_in(saved, **changed), {**HASHES, **hashes})
    step, said = run_ranks(save_or_resume, 1, plan_in(saved, allow=[kind], **changed), {**HASHES, **hashes})[0]
    assert step == 1
    assert f"with another {kind}: " in said


def test_several_changes_are_told_together(saved):
    with pytest.raises(RankFailedError, match=r"another dataset and seed: data\.prefix.*training\.seed=7"):
        run_ranks(save_or_resume, 1, plan_in(saved, seed=7), {**HASHES, "dataset": "c" * 64})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_layers": 2}, "the model has no place for layers.2"),
        ({"ffn_hidden_size": 80}, r"the model wants \[160, 64\]"),
    ],
)
def test_a_model_of_other_shapes_cannot_be_forced(saved, model, words):
    with pytest.raises(RankFailedError, match=f"{words}.*cannot be forced"):
        run_ranks(save_or_resume, 1, plan_in(saved, allow=["model"], model=model), HASHES)


def test_nothing_is_said_where_a_run_has_no_fingerprints(saved):
    assert run_ranks(save_or_resume, 1, plan_in(saved), {})[0] == (1, "")


def test_fingerprints_follow_the_content_of_a_dataset(dataset, tmp_path):
    import shutil

    from megagpt.data.fingerprint import fingerprints
    from megagpt.plan.config import DataConfig

    found = fingerprints(DataConfig(**dataset))
    assert set(found) == {"dataset", "tokenizer"}
    for suffix in ("bin", "idx"):
        shutil.copy(f"{dataset['prefix']}.{suffix}", tmp_path / f"megatron.{suffix}")
    bare = fingerprints(DataConfig(prefix=str(tmp_path / "megatron"), tokenizer=dataset["tokenizer"]))
    assert bare["tokenizer"] == found["tokenizer"], "with no manifest it is the file's"
    with (tmp_path / "megatron.idx").open("ab") as file:
        file.write(b"\0")
    assert fingerprints(DataConfig(prefix=str(tmp_path / "megatron")))["dataset"] != bare["dataset"]


def test_the_probe_says_how_exact_it_is(saved):
    from megagpt.checkpoint import CheckpointReader

    reader = CheckpointReader(saved / "step-00000001")
    tokens_BS, logits_BPV = reader.probe()
    assert (tokens_BS.shape, logits_BPV.shape) == ((1, 32), (1, 32, 250))
    assert (reader.manifest.precision, reader.manifest.probe_tolerance) == ("fp32", 1e-4)
