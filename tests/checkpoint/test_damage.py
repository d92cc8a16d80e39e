"""No damage goes unnoticed and none crashes: files, headers, manifests changed at random; and the tool that tells."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import rank_batches, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

ROOT = Path(__file__).parents[2]
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "__metadata__"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


def save_two(plan) -> None:
    """Save steps 1 and 2 of a run."""
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.engine import build_engine
    from megagpt.parallel.console import Console
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    checkpoints, state = Checkpoints(plan, engine, ranks, Console(1)), TrainState()
    for step in range(2):
        loss = engine.train_step(rank_batches(plan, ranks.data_rank, step), 1e-3).loss
        state = dataclasses.replace(state.advance(8), evaluated=step == 1)
        checkpoints.save(state, {"train_loss": float(loss), "validation_loss": 5.5 - step})
    checkpoints.wait()


@pytest.fixture(scope="module")
def run(libraries, tmp_path_factory) -> Path:
    """Directory of a run with two checkpoints, on 2 x 2 ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(save_two, 4, tiny_plan(tp=2, dp=2, zero=2, sections={"checkpoint": {"directory": str(folder)}}))
    return folder


@pytest.fixture
def checkpoint(run, tmp_path) -> Path:
    """A copy of its newest one."""
    shutil.copytree(run / "step-00000002", tmp_path / "step-00000002")
    return tmp_path / "step-00000002"


@pytest.fixture(scope="module")
def content(run) -> dict:
    """Every tensor of the newest checkpoint by kind and name."""
    return tensors_of(run / "step-00000002")


def tensors_of(folder: Path) -> dict:
    from megagpt.checkpoint import CheckpointReader

    reader = CheckpointReader(folder)
    kinds = ("weight", *reader.manifest.moments)
    return {(kind, name): reader.full(name, kind) for kind in kinds for name in reader.names}


def test_files_are_plain_safetensors(run):
    from safetensors import safe_open

    from megagpt.checkpoint import CheckpointReader

    reader = CheckpointReader(run / "step-00000002")
    with safe_open(run / "step-00000002" / "rank-00001.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ours = reader._file("rank-00001.safetensors")
    assert found
    assert set(found) == set(ours.entries)
    assert all(bool((ours.read(name) == tensor).all()) for name, tensor in found.items())


@FUZZ
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(run, checkpoint, data):
    from megagpt.checkpoint import CheckpointReader
    from megagpt.errors import CheckpointError

    name = data.draw(st.sampled_from(sorted(path.name for path in checkpoint.iterdir())))
    whole = (run / "step-00000002" / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    (checkpoint / name).write_bytes(damaged)
    try:
        if name == "manifest.sha256" and damaged.strip() == whole.strip():
            return  # the line's end
        try:
            problems = CheckpointReader(checkpoint).problems()
        except CheckpointError as error:
            problems = [str(error)]
        assert len(problems) == 1
        assert str(checkpoint) in problems[0]
    finally:
        (checkpoint / name).write_bytes(whole)


@FUZZ
@given(data=st.data())
def test_a_truncated_or_foreign_file_is_found(run, checkpoint, data):
    from megagpt.checkpoint import CheckpointReader

    name = data.draw(st.sampled_from([f"rank-{rank:05d}.safetensors" for rank in range(4)] + ["probe.safetensors"]))
    whole = (run / "step-00000002" / name).read_bytes()
    other = (run / "step-00000001" / name).read_bytes()
    assert len(other) == len(whole)
    length = data.draw(st.integers(0, len(whole) - 1))
    foreign = data.draw(st.sampled_from([whole[:length], whole + b"\0", other, other[:length] + whole[length:], b""]))
    if foreign == whole:
        return
    (checkpoint / name).write_bytes(foreign)
    try:
        assert CheckpointReader(checkpoint).problems()
    finally:
        (checkpoint / name).write_bytes(whole)


@FUZZ
@given(tree=JSON, start=st.integers(0, 64), size=st.integers(0, 1 << 40))
def test_any_header_is_read_or_refused(tree, start, size):
    from megagpt.checkpoint.tensor_file import DamagedError, parse_header

    try:
        entries = parse_header(Path("file"), json.dumps(tree).encode(), start, size)
    except DamagedError:
        return
    assert sum(entry.bytes for entry in entries.values()) == size - start


@FUZZ
@given(data=st.data())
def test_a_changed_entry_of_a_header_is_refused(run, data):
    from megagpt.checkpoint import CheckpointReader
    from megagpt.checkpoint.tensor_file import DamagedError, parse_header

    path = run / "step-00000002" / "rank-00000.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    tree = json.loads(path.read_bytes()[8 : 8 + length])
    name = data.draw(st.sampled_from([name for name in tree if name != "__metadata__"]))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    value = data.draw(JSON | st.lists(st.integers(-1, 1 << 70), max_size=3))
    if key is None:
        tree[name] = value
    else:
        tree[name] = {**tree[name], key: value}
    expected = CheckpointReader(run / "step-00000002")._file(path.name).entries
    try:
        entries = parse_header(path, json.dumps(tree).encode(), 8 + length, path.stat().st_size)
    except DamagedError:
        return
    # other dimensions of the same size are the manifest's to tell
    assert {n: (e.begin, e.bytes) for n, e in entries.items()} == {n: (e.begin, e.bytes) for n, e in expected.items()}


@FUZZ
@given(text=st.binary(max_size=200) | JSON.map(lambda tree: json.dumps(tree).encode()))
def test_any_manifest_is_read_or_refused(text):
    from megagpt.checkpoint.manifest import parse_manifest
    from megagpt.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"^manifest\.json"):
        parse_manifest(Path("manifest.json"), text)


def leaves(tree, path=()):
    """Paths of all values in a JSON tree but the run config's, which has a parser of its own."""
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if path or key not in ("run", "deepspeed"):
                yield from leaves(value, (*path, key))
    else:
        yield path


@FUZZ
@given(data=st.data())
def test_a_changed_manifest_never_gives_other_weights(run, checkpoint, content, data):
    """Even if its hash fits: each piece must be there once, and each file must be what was saved."""
    import hashlib

    from megagpt.errors import CheckpointError

    text = (run / "step-00000002" / "manifest.json").read_bytes()
    tree = json.loads(text)
    place = data.draw(st.sampled_from(list(leaves(tree))))
    target = tree
    for key in place[:-1]:
        target = target[key]
    old = target[place[-1]]
    near = [old + 1, old - 1, 0, -old] if type(old) is int else []
    target[place[-1]] = data.draw(st.sampled_from(near) | JSON if near else JSON)
    changed = json.dumps(tree).encode()
    (checkpoint / "manifest.json").write_bytes(changed)
    (checkpoint / "manifest.sha256").write_text(hashlib.sha256(changed).hexdigest())
    try:
        found = tensors_of(checkpoint)
    except CheckpointError:
        return
    assert all(key in content for key in found), "nothing is made up"
    for key, tensor in found.items():
        assert tensor.numel() == content[key].numel()
        assert bool((tensor.flatten() == content[key].flatten()).all()), (place, key)


def restore(plan) -> tuple[int, list[str]]:
    """The step that a run resumes from, and what is said."""
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
    return state.step, said.getvalue().splitlines()


@pytest.mark.parametrize("layout", [{"tp": 2, "dp": 2, "zero": 2}, {"pp": 2}, {}], ids=["same", "pp2", "one"])
@pytest.mark.parametrize("name", ["rank-00003.safetensors", "probe.safetensors"])
def test_damage_is_found_on_any_layout_and_the_older_checkpoint_is_used(run, tmp_path, layout, name):
    """Also in what this layout need not read."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 8
    path.write_bytes(data)
    plan = tiny_plan(sections={"checkpoint": {"directory": str(tmp_path / "run")}}, **layout)
    outcomes = run_ranks(restore, plan.world_size, plan)
    assert {step for step, _ in outcomes} == {1}
    assert f"{path}: " in outcomes[0][1][0]
    assert "the content has changed; this checkpoint is skipped and the next older one is tried" in outcomes[0][1][0]
    assert not path.parent.exists()


def inspect(*arguments) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "inspect_checkpoint.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return result.returncode, result.stdout + result.stderr


def test_the_tool_lists_verifies_and_shows(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "step-00000001" / "rank-00002.safetensors").write_bytes(b"short")
    code, said = inspect(tmp_path / "run", "--verify", "--parameters", "--pin")
    lines = said.splitlines()
    assert code == 1
    assert lines[1].startswith("step-00000002  16       5.4")
    assert lines[1].endswith("4.5000     TP 2 x PP 1 x DP 2  fp32       0.002  latest best pinned")
    assert "(5.5000)" in lines[2], "of no evaluation at that step"
    assert lines[2].endswith("damaged")
    assert "step-00000001/rank-00002.safetensors: 5 bytes, " in lines[3]
    assert lines[4] == "1 of 2 checkpoints are intact"
    assert "embedding.word_embeddings.weight            250 x 64" in said
    assert len(lines) == 4 + 2 + 1 + 27


def test_steps_of_more_digits_than_names_have_are_newer(run, tmp_path):
    from megagpt.checkpoint import find_checkpoint
    from megagpt.plan.evaluation import read_saved_run

    shutil.copytree(run / "step-00000001", tmp_path / "step-99999999")
    shutil.copytree(run / "step-00000002", tmp_path / "step-100000000")
    (tmp_path / "step-²").mkdir()
    assert find_checkpoint(tmp_path).name == "step-100000000"
    assert read_saved_run(tmp_path).step == 2


def test_the_tool_takes_a_run_that_is_called_like_a_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "step-sizes")
    code, said = inspect(tmp_path / "step-sizes")
    assert code == 0
    assert said.splitlines()[1].startswith("step-00000002")


def test_the_tool_knows_the_working_directory_by_its_name(run, tmp_path, monkeypatch):
    from megagpt.checkpoint.inspection import summarise

    shutil.copytree(run, tmp_path / "run")
    for there, named in ((".", "."), ("below", "..")):
        folder = tmp_path / "run" / "step-00000002" / there
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        (summary,) = summarise(Path(named), with_hash=False)
        assert (summary.folder.name, summary.marks) == ("step-00000002", ("latest", "best"))


def test_a_checkpoint_that_cannot_be_pinned_is_one_error(run, tmp_path):
    shutil.copytree(run / "step-00000001", tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / "pinned").symlink_to(tmp_path / "absent" / "pinned")
    code, said = inspect(tmp_path, "--pin")
    assert code == 2
    assert said.startswith(f"error: {tmp_path}/step-00000001/pinned: cannot be made (No such file or directory); mend")
    assert said.count("\n") == 1


@pytest.mark.parametrize("failing", ["rmdir", "rename"])
def test_a_checkpoint_that_cannot_be_deleted_yet_does_not_end_the_run(run, tmp_path, monkeypatch, failing):
    from megagpt.checkpoint.retention import Retention
    from megagpt.plan.config import CheckpointConfig

    def busy(*args, **kwargs):
        raise OSError(16, "Device or resource busy")

    shutil.copytree(run, tmp_path / "run")
    retention = Retention(tmp_path / "run", CheckpointConfig(keep_last=1, keep_best=0))
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, busy)
        retention.apply()
    assert (tmp_path / "run" / "step-00000001").exists() == (failing == "rename")
    retention.clean()
    retention.apply()
    left = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert left == ["step-00000002"]


def test_the_tool_compares_two(run):
    one, other = run / "step-00000001", run / "step-00000002"
    assert inspect(one, "--compare", one) == (0, f"{one} and {one}\nall tensors are equal, bit for bit\n")
    code, said = inspect(one, "--compare", other)
    assert code == 1
    assert "step: 1 and 2\nsamples: 8 and 16\n" in said
    assert "exp_avg/layers.3." in said
    assert said.endswith(" tensors differ\n")
