"""What a run meets before its first step: troubles of other ranks, folders, checksums, checkpoints to go on from."""

import dataclasses
import shutil

import pytest
from ranks import RankFailedError, run_ranks
from trained import plan_in, train

pytestmark = pytest.mark.usefixtures("libraries")


def train_and_list_draws(plan) -> list[str]:
    """Parameters that are given random values on the way."""
    from megagpt.model import initialize

    drawn, draw = [], initialize._full_weight
    initialize._full_weight = lambda name, *args: drawn.append(name) or draw(name, *args)
    try:
        train(plan)
    finally:
        initialize._full_weight = draw
    return drawn


def test_a_run_that_goes_on_draws_no_weights(dataset, tmp_path):
    (drawn,) = run_ranks(train_and_list_draws, 1, plan_in(tmp_path, dataset, steps=2))
    assert "embedding.word_embeddings.weight" in drawn
    assert run_ranks(train_and_list_draws, 1, plan_in(tmp_path, dataset, steps=3)) == [[]]


def lose_the_checkpoints(plan) -> None:
    """Take them away between the start and the restore."""
    import shutil

    from megagpt.checkpoint import Checkpoints

    restore = Checkpoints.restore_latest

    def restore_after_the_loss(self):
        shutil.rmtree(plan.run.checkpoint.directory)
        return restore(self)

    Checkpoints.restore_latest = restore_after_the_loss
    try:
        train(plan)
    finally:
        Checkpoints.restore_latest = restore


def test_checkpoints_that_vanish_while_the_run_starts_are_missed(dataset, tmp_path):
    run_ranks(train, 1, plan_in(tmp_path, dataset, steps=2))
    with pytest.raises(RankFailedError, match="had checkpoints when the run started and has none now; start it again"):
        run_ranks(lose_the_checkpoints, 1, plan_in(tmp_path, dataset, steps=3))


@pytest.mark.parametrize("key", ["checkpoint", "logging"])
def test_a_file_in_place_of_a_folder_is_found_before_the_first_step(dataset, tmp_path, key):
    (tmp_path / {"checkpoint": "checkpoints", "logging": "logs"}[key]).write_text("not a folder")
    plan = plan_in(tmp_path, dataset, dp=2)
    with pytest.raises(RankFailedError) as failure:
        run_ranks(train, 2, plan)
    assert str(failure.value).count(f"ConfigError: {key}.directory={tmp_path}/") == 2, "on both ranks"
    assert "cannot be written to (Not a directory); give a writable folder" in str(failure.value)


def test_what_one_rank_meets_before_it_knows_the_others_it_tells_by_its_name(dataset, tmp_path, monkeypatch):
    from megagpt import train as module
    from megagpt.errors import RankError
    from megagpt.parallel.launch import Launch

    missing = plan_in(tmp_path, {**dataset, "prefix": f"{tmp_path}/missing"}, dp=2)
    monkeypatch.setattr(module, "StopSignal", lambda: None)
    monkeypatch.setattr(module, "find_launch", lambda: Launch(1, 1, 2, "127.0.0.1", 1, "torchrun"))
    for name in ("load_run_config", "load_deepspeed_config"):
        monkeypatch.setattr(module, name, lambda *args: None)
    monkeypatch.setattr(module, "make_plan", lambda *args: missing)
    monkeypatch.setattr("sys.argv", ["train", "--config", "run.yaml", "--deepspeed_config", "ds.json"])
    with pytest.raises(RankError, match=f"rank 1 on .*: .*{tmp_path}/missing"):
        module.main()


def train_under_srun_where_rank_1_lacks_the_dataset(plan) -> tuple[str, int]:
    """What this rank says, and its exit status."""

    from megagpt.errors import RankError
    from megagpt.parallel.launch import detect_launch
    from megagpt.plan import run_config_from_dict
    from megagpt.signals import StopSignal
    from megagpt.train import run

    launch = dataclasses.replace(detect_launch(), launcher="srun")
    if launch.rank == 1:
        tree = plan.run.model_dump(mode="json")
        tree["data"]["prefix"] += "-missing"
        plan = dataclasses.replace(plan, run=run_config_from_dict(tree))
    try:
        run(plan, launch, StopSignal())
    except RankError as error:
        return str(error), error.exit_code
    return "", 0


def test_what_one_rank_lacks_under_srun_ends_all_with_its_status(dataset, tmp_path):
    plan = plan_in(tmp_path, dataset, dp=2)
    (said, status), other = run_ranks(train_under_srun_where_rank_1_lacks_the_dataset, 2, plan)[::-1]
    assert said.startswith("rank 1 on ")
    assert "-missing.bin does not exist" in said
    assert (status, other) == (2, ("", 2))


def test_ranks_share_the_datasets_whose_checksums_they_compare(dataset, tmp_path):
    for name in ("one", "other"):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(f"{dataset['prefix']}{suffix}", tmp_path / f"{name}{suffix}")
    with (tmp_path / "other.bin").open("r+b") as file:
        file.write(b"\x05")
    datasets = [{"prefix": str(tmp_path / name), "weight": 1.0} for name in ("one", "other")]
    data = {"prefix": None, "datasets": datasets, "verify_checksums": True}
    with pytest.raises(RankFailedError) as failure:
        run_ranks(train, 2, plan_in(tmp_path, dataset, dp=2, data=data))
    assert str(failure.value).count(f"DataError: {tmp_path}/other.bin has sha256") == 2, "on both ranks"
