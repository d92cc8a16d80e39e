"""Commands as users run them: training under a launcher, bad input, generation and conversion."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from tiny import LLAMA

pytestmark = pytest.mark.usefixtures("libraries")

ROOT = Path(__file__).parents[2]
RUN = {
    "model": {**LLAMA, "vocab_size": 300, "max_position_embeddings": 32},
    "data": {"prefix": "data", "tokenizer": "tokenizer.model"},
    "training": {"steps": 4},
    "checkpoint": {"directory": "checkpoints"},
    "logging": {"directory": "logs"},
}
DEEPSPEED = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
ARGUMENTS = ["--config", "run.yaml", "--deepspeed_config", "ds.json"]


@pytest.fixture
def workplace(dataset, tmp_path) -> Path:
    """A folder with a dataset, its tokenizer, run.yaml and ds.json."""
    for path in Path(dataset["prefix"]).parent.iterdir():
        if path.suffix != ".jsonl":
            shutil.copy(path, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(copy.deepcopy(RUN)))
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    return tmp_path


def command(workplace: Path, world_size: int, arguments: list[str], module: str = "megagpt.train") -> tuple:
    """Exit status, stdout and stderr of a command's main function, run as rank 0 of `world_size`."""
    import contextlib
    import importlib
    import io

    from megagpt.errors import run_command

    os.chdir(workplace)
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = [module, *arguments]
    code = None
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as warned:
        try:
            run_command(importlib.import_module(module).main)
        except SystemExit as end:
            code = end.code
    return code, said.getvalue(), warned.getvalue()


def deepspeed(**keys):
    """A change of ds.json."""
    return lambda folder: (folder / "ds.json").write_text(json.dumps({**DEEPSPEED, **keys}))


def truncated(name: str, size: int):
    return lambda folder: os.truncate(folder / name, size)


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def other_tokenizer(folder: Path) -> None:
    from megagpt.data.tokenizer import train_sentencepiece

    train_sentencepiece(["other words than those of the dataset"] * 30, folder / "other", vocab_size=280)


def tp(size: int) -> str:
    return f"parallel.tensor_model_parallel_size={size}"


def pp(size: int) -> str:
    return f"parallel.pipeline_model_parallel_size={size}"


RUN_YAML = "run.yaml with the command line's overrides"

# name: arguments, ranks, what is done to the folder before, the message
BAD_INPUT = {
    "misspelt key": (
        ["model.num_layer=4"],
        1,
        None,
        f"{RUN_YAML}: model.num_layer: unknown key; did you mean num_layers?",
    ),
    "unknown section": (["optim.lr=1"], 1, None, f"{RUN_YAML}: optim: unknown key; did you mean optimizer?"),
    "wrong type": (["training.steps=ten"], 1, None, f"{RUN_YAML}: training.steps='ten' must be an integer"),
    "no value": (
        ["training.steps"],
        1,
        None,
        f"{RUN_YAML}: override 'training.steps' is not of the form section.key=value",
    ),
    "batch size in the run config": (
        ["training.train_batch_size=8"],
        1,
        None,
        f"{RUN_YAML}: training.train_batch_size: unknown key; batch sizes, precision, ZeRO and clipping belong in the "
        "DeepSpeed JSON (--deepspeed_config)",
    ),
    "heads and TP": (
        [tp(3), "model.num_query_groups=4", "model.ffn_hidden_size=96"],
        3,
        None,
        "model.num_attention_heads=4 is not divisible by parallel.tensor_model_parallel_size=3; use 1, 2 or 4",
    ),
    "layers and PP": (
        [pp(8)],
        8,
        None,
        "model.num_layers=4 is less than parallel.pipeline_model_parallel_size=8; use at most 4 stages",
    ),
    "world size": (
        [tp(2), pp(2)],
        6,
        None,
        "world size 6 is not a multiple of parallel.tensor_model_parallel_size x pipeline_model_parallel_size = 2 x 2 "
        "= 4; start 4 or 8 ranks, or change the layout",
    ),
    "batch size": (
        [],
        1,
        deepspeed(train_batch_size=9),
        "ds.json: train_batch_size=9 is not a multiple of train_micro_batch_size_per_gpu x data-parallel size = 2 x 1 "
        "= 2; use 8 or 10",
    ),
    "accumulation": (
        [],
        1,
        deepspeed(gradient_accumulation_steps=3),
        "ds.json: train_batch_size=8 is not train_micro_batch_size_per_gpu x gradient_accumulation_steps x "
        "data-parallel size = 2 x 3 x 1 = 6; use train_batch_size=6 or gradient_accumulation_steps=4, or remove "
        "one of the three",
    ),
    "ZeRO 2 and PP": (
        [pp(2)],
        2,
        deepspeed(zero_optimization={"stage": 2}),
        "ds.json: zero_optimization.stage=2 does not go with parallel.pipeline_model_parallel_size=2 (DeepSpeed's "
        "pipeline engine refuses it); use stage 1, or pipeline_model_parallel_size=1",
    ),
    "ZeRO 3 and PP": (
        [pp(2)],
        2,
        deepspeed(zero_optimization={"stage": 3}),
        "ds.json: zero_optimization.stage=3 does not go with parallel.pipeline_model_parallel_size=2 (DeepSpeed's "
        "pipeline engine refuses it); use stage 1, or pipeline_model_parallel_size=1",
    ),
    "optimizer in the JSON": (
        [],
        1,
        deepspeed(optimizer={"type": "Adam"}),
        "ds.json: optimizer: the optimizer belongs in the run config's `optimizer:` section (name, lr, weight_decay, "
        "...); remove it here",
    ),
    "no dataset": (
        ["data.prefix=nowhere/data"],
        1,
        None,
        "nowhere/data.bin does not exist; data.prefix is the path without .bin/.idx, and tools/preprocess_data.py "
        "writes both files",
    ),
    "half a dataset": (
        [],
        1,
        lambda folder: (folder / "data.idx").unlink(),
        "data.idx does not exist; data.prefix is the path without .bin/.idx, and tools/preprocess_data.py writes both "
        "files",
    ),
    "truncated tokens": (
        [],
        1,
        truncated("data.bin", 1000),
        "data.bin has 1000 bytes, expected * from data.idx: a file is truncated or the two do not belong together; "
        "rebuild both files with tools/preprocess_data.py",
    ),
    "truncated index": (
        [],
        1,
        truncated("data.idx", 40),
        "data.idx has 40 bytes, expected * for 250 sequences and 250 documents; rebuild both files with "
        "tools/preprocess_data.py",
    ),
    "vocabulary": (
        ["model.vocab_size=250"],
        1,
        None,
        "model.vocab_size=250 but dataset data was made with 300 tokens (tokenizer.model); set model.vocab_size=300",
    ),
    "tokenizer of another dataset": (
        ["data.tokenizer=other.model"],
        1,
        other_tokenizer,
        "data.tokenizer=other.model (280 tokens, sha256 *...) is not the tokenizer of data.prefix=data "
        "(tokenizer.model, 300 tokens, sha256 *...); give that one or rebuild the dataset",
    ),
    "no tokenizer": (
        ["data.tokenizer=absent.model"],
        1,
        None,
        "tokenizer absent.model does not exist; train one with tools/train_tokenizer.py",
    ),
    "no config": (
        ["--config", "absent.yaml"],
        1,
        None,
        "absent.yaml: cannot be read (No such file or directory); check the path",
    ),
    "no JSON": (
        ["--deepspeed_config", "absent.json"],
        1,
        None,
        "absent.json: cannot be read (No such file or directory); check the path",
    ),
    "a folder for a config": (["--config", "."], 1, None, ".: cannot be read (Is a directory); check the path"),
    "a folder for the JSON": (
        ["--deepspeed_config", "."],
        1,
        None,
        ".: cannot be read (Is a directory); check the path",
    ),
    "an empty config": (
        [],
        1,
        written("run.yaml", ""),
        "run.yaml: section `model:` is missing; add it\nerror: run.yaml: section `training:` is missing; add it",
    ),
    "a list for a config": ([], 1, written("run.yaml", "- a\n"), "run.yaml: must hold `key: value` lines, not ['a']"),
    "no JSON syntax": (
        [],
        1,
        written("ds.json", "{'a': 1}"),
        "ds.json: not valid JSON at line 1, column 2: Expecting property name enclosed in double quotes",
    ),
    "a file for a folder": (
        [],
        1,
        written("checkpoints", ""),
        "checkpoint.directory=checkpoints cannot be written to (Not a directory); give a writable folder",
    ),
    "a link to nowhere for a folder": (
        [],
        1,
        lambda folder: (folder / "checkpoints").symlink_to(folder / "absent"),
        "checkpoint.directory=checkpoints cannot be written to (No such file or directory); give a writable folder",
    ),
}


@pytest.mark.parametrize(("arguments", "world_size", "prepare", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gives_one_clear_message_and_leaves_nothing(workplace, arguments, world_size, prepare, message):
    import re

    if prepare is not None:
        prepare(workplace)
    before = {path: path.lstat().st_mtime_ns for path in workplace.rglob("*")}
    ((code, said, warned),) = run_ranks(command, 1, workplace, world_size, [*ARGUMENTS, *arguments])
    pattern = re.escape(f"error: {message}\n").replace(r"\*", r"[0-9a-f]+")
    pattern += r"(advice: (nearest|no) layout of [^\n]*\n)?"  # what it says is tested with the plan
    assert re.fullmatch(pattern, warned), warned
    assert (code, said) == (2, "")
    assert {path: path.lstat().st_mtime_ns for path in workplace.rglob("*")} == before


def test_a_checkpoint_of_another_model_is_refused(workplace, trained):
    arguments = [*ARGUMENTS, f"checkpoint.directory={trained('llama')}", "training.steps=50", "model.num_layers=3"]
    before = sorted(trained("llama").iterdir())
    ((code, _, warned),) = run_ranks(command, 1, workplace, 1, arguments)
    assert code == 2
    assert warned == (
        f"error: {trained('llama')}/step-00000040 belongs to another model: model.num_layers=3 (there 4); use its "
        "settings or another checkpoint.directory\n"
    )
    assert sorted(trained("llama").iterdir()) == before


def test_overrides_may_stand_anywhere_and_habits_do_no_harm(workplace):
    from megagpt.train import parse_arguments

    arguments = [
        "a.b=1",
        "--local_rank=1",
        "--config",
        "run.yaml",
        "c.d=2",
        "--deepspeed",
        "--deepspeed_config",
        "ds.json",
    ]
    parsed = parse_arguments([*arguments, "e.f=3"])
    assert parsed.overrides == ["a.b=1", "c.d=2", "e.f=3"]
    assert (parsed.config, parsed.deepspeed_config) == ("run.yaml", "ds.json")


def test_other_ranks_of_a_host_do_not_repeat_the_message(workplace):
    def rank_1(*arguments) -> tuple:
        os.environ.update(RANK="1", LOCAL_RANK="1")
        return command(*arguments)

    ((code, said, warned),) = run_ranks(rank_1, 1, workplace, 2, [*ARGUMENTS, "training.steps=0"])
    assert (code, said, warned) == (2, "", "")


def shell(workplace: Path, *arguments: object) -> subprocess.CompletedProcess:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, arguments)]
    return subprocess.run(words, cwd=workplace, env=environ, capture_output=True, text=True, timeout=200, check=False)


def test_torchrun_trains_and_the_tools_use_what_it_made(workplace):
    """One real run: launcher, two ranks, tools as scripts."""
    train = shell(
        workplace,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "megagpt.train",
        *ARGUMENTS,
        pp(2),
        "training.steps=2",
    )
    assert train.returncode == 0, train.stderr
    lines = train.stdout.splitlines()
    assert lines[0].endswith("TP 1 x PP 2 x DP 1, ZeRO 1, started by torchrun")
    assert lines[-1].startswith("step 2/2  saved checkpoints/step-00000002 in ")
    assert "Warning" not in train.stderr
    assert "Error" not in train.stderr

    says = shell(
        workplace,
        ROOT / "tools/generate.py",
        "--checkpoint",
        "checkpoints",
        "--prompt",
        "the tensor",
        "--max-new-tokens",
        5,
    )
    assert (says.returncode, says.stderr) == (0, "")
    assert says.stdout.startswith("the tensor")

    converts = shell(workplace, ROOT / "tools/convert_to_hf.py", "--checkpoint", "checkpoints", "--output", "hf")
    assert (converts.returncode, converts.stderr) == (0, "")
    assert converts.stdout.splitlines()[0].startswith(f"{workplace}/hf: llama, ")
    assert "logits against the training ranks:       largest difference " in converts.stdout
    assert (workplace / "hf" / "model.safetensors").is_file()

    again = shell(workplace, ROOT / "tools/convert_to_hf.py", "--checkpoint", "checkpoints", "--output", "hf")
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {workplace}/hf exists; give another folder")


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("to_hf", ["--output", "s3://bucket/hf"], "s3://bucket/hf is in an object store, which this cannot use; give"),
        ("from_hf", ["--input", "s3://bucket/hf"], "s3://bucket/hf is in an object store, which this cannot use; give"),
        ("to_hf", ["--output", "hf", "--max-shard-gb", "nan"], "--max-shard-gb=nan must be a number of at least 1e-9"),
        ("to_hf", ["--output", "hf", "--max-shard-gb", "inf"], "--max-shard-gb=inf must be a number of at least 1e-9"),
        ("to_hf", ["--output", "hf", "--max-shard-gb", "0"], "--max-shard-gb=0.0 must be a number of at least 1e-9"),
    ],
)
def test_what_the_converters_cannot_use_is_refused_before_any_work(tmp_path, tool, arguments, message):
    arguments = [*arguments, *(("--checkpoint", "absent") if tool == "to_hf" else ("--output", "made"))]
    said = shell(tmp_path, ROOT / f"tools/convert_{tool}.py", *arguments)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith(f"error: {message}")
    assert said.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
