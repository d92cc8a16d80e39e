"""Resume: bit for bit on the same layout, the same curve on another one, never from a damaged file."""

import os
import shutil
from pathlib import Path

import pytest
from ranks import RankFailedError, run_ranks
from tiny import ADAM, SGD, rank_batches, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

HALF, WHOLE = 3, 6
OVERFLOWING = {"fp16": {"initial_scale_power": 21, "hysteresis": 1, "loss_scale_window": 2}}
"""A scale that is too large at first, and soon again."""
OFFLOADING = {"offload_optimizer": {"device": "cpu"}}
OFFLOADING_ALL = {**OFFLOADING, "offload_param": {"device": "cpu"}}


def plan_in(folder: Path, **layout):
    sections = {"checkpoint": {"directory": str(folder)}}
    return tiny_plan(
        layout.pop("model", "llama"), layout.pop("optimizer", ADAM), steps=WHOLE, sections=sections, **layout
    )


def curve(plan, save_at: int | None = None, resumes: bool = False, until: int = WHOLE) -> list[tuple]:
    """(loss, gradient norm, loss scale) per step on this rank; saves after `save_at` steps, or resumes first."""
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
        assert restored is not None, "there is a checkpoint to resume from"
        state = restored
    values = []
    while state.step < until:
        result = engine.train_step(rank_batches(plan, ranks.data_rank, state.step), plan.run.optimizer.lr)
        state = state.advance(plan.global_batch_size, result.skipped)
        values.append((float(result.loss), float(result.grad_norm), result.loss_scale))
        checkpoints.poll()
        if state.step == save_at:
            checkpoints.save(state, {})
    checkpoints.wait()
    return values


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "pp": 2},
        {"tp": 2, "pp": 2, "precision": "bf16", "model": "gpt2"},
        {"pp": 2, "dp": 2, "optimizer": SGD},
        {"tp": 2, "dp": 2, "zero": 2, "precision": "bf16"},
        {"dp": 2, "zero": 3},
        {"tp": 2, "sp": True},
        {"tp": 2, "pp": 2, "precision": "fp16", "model": "gpt2", "deepspeed": OVERFLOWING},
        {"tp": 2, "pp": 2, "precision": "bf16", "model": "gpt2", "deepspeed": {"zero_optimization": OFFLOADING}},
        {"dp": 2, "zero": 3, "precision": "fp16", "deepspeed": {**OVERFLOWING, "zero_optimization": OFFLOADING_ALL}},
        {"cp": 2, "pp": 2},
        {"cp": 2, "zero": 3},
    ],
    ids=lambda layout: "-".join(
        f"{key}{value if isinstance(value, str | int) else ''}" for key, value in layout.items()
    ),
)
def test_resume_is_bit_exact(tmp_path, layout):
    plan = plan_in(tmp_path, dropout=0.1, **layout)
    undisturbed = run_ranks(curve, plan.world_size, plan, save_at=HALF)
    resumed = run_ranks(curve, plan.world_size, plan, resumes=True)
    assert [values[HALF:] for values in undisturbed] == resumed
    if plan.precision == "fp16":
        before, after = ({scale for *_, scale in part} for part in (undisturbed[0][:HALF], resumed[0]))
        assert len(before) > 1, "an update was skipped before saving, so that Adam has made fewer than there were steps"
        assert len(after) > 1, "and the scale changed after resuming, at a step that depends on what was saved"


@pytest.mark.parametrize(
    "source", [{"tp": 2, "pp": 2}, {"dp": 2, "zero": 3}, {"cp": 2}], ids=["tp2pp2", "zero3", "cp2"]
)
def test_resume_on_another_layout_continues_the_curve(tmp_path, source):
    plan = plan_in(tmp_path, optimizer=ADAM, **source)
    expected = run_ranks(curve, plan.world_size, plan, save_at=HALF)[0][HALF:]
    for target in ({}, {"pp": 2, "dp": 2}, {"tp": 2, "dp": 2, "zero": 2}, {"tp": 2, "zero": 3}, {"tp": 2, "cp": 2}):
        other = plan_in(tmp_path, **target)
        values = run_ranks(curve, other.world_size, other, resumes=True)[0]
        assert [v[0] for v in values] == pytest.approx([v[0] for v in expected], abs=1e-5), target
        assert [v[1] for v in values] == pytest.approx([v[1] for v in expected], rel=1e-4), target


def test_a_move_to_another_precision_or_memory_continues_the_curve(tmp_path):
    offloading = {**OVERFLOWING, "zero_optimization": OFFLOADING}
    plan = plan_in(tmp_path, precision="fp16", model="gpt2", tp=2, pp=2, deepspeed=offloading)
    expected = run_ranks(curve, 4, plan, save_at=HALF)[0][HALF:]
    for target, error in (
        ({"precision": "fp16", "deepspeed": OVERFLOWING, "tp": 2, "zero": 2}, 2e-3),
        ({"precision": "bf16", "deepspeed": {"zero_optimization": OFFLOADING_ALL}, "dp": 2, "zero": 3}, 0.05),
    ):
        other = plan_in(tmp_path, model="gpt2", **target)
        values = run_ranks(curve, 2, other, resumes=True)[0]
        assert values[0][2] == (expected[0][2] if other.precision == "fp16" else None)
        assert values[0][0] == pytest.approx(expected[0][0], abs=error), target


def test_tied_weights_survive_a_move(tmp_path):
    plan = plan_in(tmp_path, model="gpt2", tp=2, pp=2)
    expected = run_ranks(curve, 4, plan, save_at=HALF)[0][HALF:]
    other = plan_in(tmp_path, model="gpt2", tp=1, pp=2)
    values = run_ranks(curve, 2, other, resumes=True)[0]
    assert [v[0] for v in values] == pytest.approx([v[0] for v in expected], abs=1e-5)


def probe_of_one_process(folder: Path) -> tuple:
    """Logits that the training ranks kept, and those of the same weights and tokens in one process."""
    from megagpt.checkpoint import CheckpointReader, find_checkpoint
    from megagpt.generate import load_model, model_logits

    model, reader = load_model(folder)
    tokens_BS, logits_BPV = CheckpointReader(find_checkpoint(folder)).probe()
    return logits_BPV, model_logits(model, tokens_BS, reader.run.model.vocab_size)[:, : logits_BPV.shape[1]]


@pytest.mark.parametrize("layout", [{"cp": 2, "pp": 2}, {"cp": 4, "zero": 3}], ids=["cp2pp2", "cp4"])
def test_the_probe_joins_the_positions_of_context_parallel_ranks(tmp_path, layout):
    plan = plan_in(tmp_path, model="gpt2", **layout)
    run_ranks(curve, plan.world_size, plan, save_at=1, until=1)
    trained, alone = run_ranks(probe_of_one_process, 1, tmp_path)[0]
    assert trained.shape == (1, plan.seq_length, plan.model.vocab_size)
    assert (trained - alone).abs().max() < 1e-5


def test_damaged_checkpoints_are_skipped_loudly(tmp_path):
    plan = plan_in(tmp_path)
    run_ranks(curve, 1, plan, save_at=1, until=1)
    run_ranks(curve, 1, plan, save_at=2, until=2)
    newest = tmp_path / "step-00000002"
    weights = newest / "rank-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    kept = tmp_path / "kept"
    shutil.copytree(newest, kept)

    def damaged(name: str, content: bytes | None) -> str:
        """What is said when the newest checkpoint has this file; the one before is used, nothing is deleted."""
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(kept, newest)
        (newest / name).unlink()
        if content is not None:
            (newest / name).write_bytes(content)
        step, said = run_ranks(restored_step, 1, plan)[0]
        assert step == 1
        assert not newest.exists(), "set aside, or retention would count it as the newest"
        assert list(tmp_path.glob("damaged-step-00000002-*"))
        return said

    said = damaged(weights.name, bytes(data))
    assert "rank-00000.safetensors: " in said
    assert "the content has changed" in said
    assert "the next older one is tried" in said
    assert "is kept as damaged-step-00000002" in said
    assert "1000 bytes" in damaged(weights.name, data[:1000])
    assert "missing" in damaged(weights.name, None)
    assert "manifest.json: SHA-256 differs" in damaged("manifest.json", b"{")
    assert "missing" in damaged("manifest.json", None)
    assert "missing" in damaged("manifest.sha256", None)


def test_a_manifest_cannot_lead_elsewhere_nor_leave_a_gap(tmp_path):
    from megagpt.checkpoint import CheckpointReader
    from megagpt.checkpoint.manifest import read_manifest, write_manifest
    from megagpt.errors import CheckpointError

    run_ranks(curve, 2, plan_in(tmp_path, dp=2), save_at=1, until=1)
    folder = tmp_path / "step-00000001"
    manifest = read_manifest(folder)
    name, parameter = next((n, p) for n, p in manifest.parameters.items() if len(p.pieces) > 1)

    def with_pieces(pieces):
        changed = parameter.model_copy(update={"pieces": tuple(pieces)})
        write_manifest(folder, manifest.model_copy(update={"parameters": {**manifest.parameters, name: changed}}))
        return CheckpointReader(folder)

    assert with_pieces(reversed(parameter.pieces)).full(name).shape == parameter.shape
    with pytest.raises(CheckpointError, match=r"elements of weight/.* are here"):
        with_pieces(parameter.pieces[:1]).full(name)
    with pytest.raises(CheckpointError, match="after the 0 before"):
        with_pieces(parameter.pieces[1:]).full(name)
    with pytest.raises(CheckpointError, match="is not among its files"):
        with_pieces([parameter.pieces[0].model_copy(update={"file": "../elsewhere.safetensors"})])
    write_manifest(folder, manifest.model_copy(update={"run": {**manifest.run, "bogus": 1}}))
    with pytest.raises(CheckpointError, match="bogus: unknown key"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: {"format": manifest.format + 1}, "this version reads format"),
        (lambda manifest: {"run": {**manifest.run, "later": {}}}, "later: unknown key.*another version of megagpt"),
    ],
    ids=["format", "run config"],
)
def test_a_checkpoint_of_another_version_is_no_damage(tmp_path, change, words):
    """Passed over, the steps since the one before would be trained again and the newer one be forgotten."""
    from megagpt.checkpoint import finished_step
    from megagpt.checkpoint.manifest import read_manifest, write_manifest

    plan = plan_in(tmp_path)
    run_ranks(curve, 1, plan, save_at=1, until=1)
    newer = tmp_path / "step-00000002"
    shutil.copytree(tmp_path / "step-00000001", newer)
    manifest = read_manifest(newer)
    write_manifest(newer, manifest.model_copy(update=change(manifest)))
    with pytest.raises(RankFailedError, match=words):
        run_ranks(restored_step, 1, plan)
    assert newer.exists()
    done = tiny_plan(steps=1, sections={"checkpoint": {"directory": str(tmp_path)}})
    assert finished_step(done) is None, "of what the newest one says nothing is known"


def test_a_run_without_an_intact_checkpoint_does_not_start_afresh(tmp_path):
    plan = plan_in(tmp_path)
    run_ranks(curve, 1, plan, save_at=1, until=1)
    (tmp_path / "step-00000001" / "rank-00000.safetensors").unlink()
    with pytest.raises(RankFailedError, match="none of its 1 checkpoints is intact"):
        run_ranks(restored_step, 1, plan)
    assert (tmp_path / "step-00000001" / "manifest.json").exists()


def test_a_checkpoint_of_an_older_step_is_not_pruned_by_damaged_newer_ones(tmp_path):
    plan = plan_in(tmp_path)
    run_ranks(curve, 1, plan, save_at=1, until=1)
    for step in (4, 5):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / f"step-{step:08d}")
        (tmp_path / f"step-{step:08d}" / "probe.safetensors").unlink()
    run_ranks(curve, 1, plan, save_at=2, resumes=True, until=2)
    names = sorted(path.name.split("-1")[0] for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["damaged-step-00000004", "damaged-step-00000005", "step-00000001", "step-00000002"]


def restored_step(plan) -> tuple[int | None, str]:
    import contextlib
    import io

    from megagpt.checkpoint import Checkpoints
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    checkpoints = Checkpoints(plan, build_engine(plan, ranks), ranks, Console(ranks.rank))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        state = checkpoints.restore_latest()
    return (None if state is None else state.step), said.getvalue()


def test_another_model_is_refused_with_the_difference(tmp_path):
    run_ranks(curve, 1, plan_in(tmp_path), save_at=1, until=1)
    other = plan_in(tmp_path, model="gpt2")
    with pytest.raises(RankFailedError, match=r"belongs to another model: .*model\.num_layers=3 \(there 4\)"):
        run_ranks(curve, 1, other, resumes=True)


def test_a_finished_run_is_told_apart_from_another_models(tmp_path):
    from megagpt.checkpoint import finished_step
    from megagpt.errors import CheckpointError

    sections = {"checkpoint": {"directory": str(tmp_path)}}
    run_ranks(curve, 1, tiny_plan(steps=2, sections=sections), save_at=2, until=2)
    assert finished_step(tiny_plan(steps=2, sections=sections)) == 2
    assert finished_step(tiny_plan(steps=3, sections=sections)) is None
    with pytest.raises(CheckpointError, match="belongs to another model"):
        finished_step(tiny_plan("gpt2", steps=2, sections=sections))


def test_another_run_that_saves_there_is_suspected(tmp_path):
    """It removes what it takes for the rest of a killed run."""

    def disturbed() -> None:
        import megagpt.checkpoint.checkpoints as module

        write = module.write_tensors

        def swept(path, tensors):
            shutil.rmtree(path.parent)
            return write(path, tensors)

        module.write_tensors = swept
        curve(plan_in(tmp_path), save_at=1, until=1)

    with pytest.raises(RankFailedError, match=r"could not be saved \(rank 0: .*and does no other run save there\?"):
        run_ranks(disturbed, 1)


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    plan = plan_in(tmp_path, dp=2)
    run_ranks(curve, 2, plan, save_at=1, until=1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "copy")

    def fail_on_rank_1() -> None:
        import megagpt.checkpoint.checkpoints as module

        def full_disk(path, tensors):
            raise OSError(28, "No space left on device", str(path))

        if os.environ["RANK"] == "1":
            module.write_tensors = full_disk
        curve(plan, save_at=2, until=2)

    with pytest.raises(RankFailedError, match=r"step-00000002: could not be saved \(rank 1: .*No space left"):
        run_ranks(fail_on_rank_1, 2)
    assert not (tmp_path / "step-00000002").exists()
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (tmp_path / "step-00000001" / path.name).read_bytes()
    assert run_ranks(curve, 2, plan, resumes=True)  # and the run goes on
