"""Import and export of a Hugging Face model against a plain copy of its tensors: time and peak memory.

    python tools/bench/convert.py --size 1b --rounds 3

Every side runs in its own process: `copy` reads one tensor at a time with safetensors, writes it and syncs; `import` is
tools/convert_from_hf.py, `export` tools/convert_to_hf.py (to bf16) on what that has made. What a process that only
imports the same modules needs is start-up and taken off. Of what remains, `check` is the logits (import: those that
later exports are compared with; export: transformers' and ours) and `convert` all else: reading, hashing, writing and
syncing. The goal for time is about `convert`, the one for memory about the whole. `--depths` measures memory for half
as many layers, too: it must be the same.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MODELS = {
    "1b": {"num_layers": 22, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 4}
    | {"ffn_hidden_size": 5632},
    "smoke": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    | {"ffn_hidden_size": 96},
}
VOCABULARY = {"1b": 32000, "smoke": 500}
MEMORY_GOAL_GB, TIME_GOAL = 0.3, 2.0
DEPTH_GOAL_GB = 0.03
"""Most that twice as many layers may add to the peak."""

# Runs a command's file, or a statement, and writes what it has cost where it is told to: the peak of its resident
# memory (KiB), and wall and CPU seconds of the check of logits.
WRAPPER = """
import atexit, json, re, runpy, sys, time
report, what, *arguments = sys.argv[1:]
check = [0.0, 0.0]
def tell():
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    open(report, "w").write(json.dumps([peak, *check]))
atexit.register(tell)
def timed(function):
    def run(*args, **kwargs):
        before = time.monotonic(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            check[0] += time.monotonic() - before[0]
            check[1] += time.process_time() - before[1]
    return run
if what.endswith("convert_from_hf.py"):
    import megagpt.import_hf as module
    module._probe = timed(module._probe)
elif what.endswith("convert_to_hf.py"):
    import megagpt.export as module
    module.certify = timed(module.certify)
if what.endswith(".py"):
    sys.argv = [what, *arguments]
    runpy.run_path(what, run_name="__main__")
else:
    exec(what)
"""
IMPORTS = {
    "import": "import megagpt.import_hf as m; m.start_single_process()",
    "export": (
        "import megagpt.export as m; m.start_single_process(); "
        "from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM"
    ),
    "copy": "import torch; from safetensors import safe_open; import json, struct",
}
COPY = """
import json, os, struct, sys, torch
from safetensors import safe_open
with safe_open(arguments[0], framework="pt") as source, open(arguments[1], "xb") as target:
    header, end = {}, 0
    for name in source.keys():
        part = source.get_slice(name)
        size = 2
        for n in part.get_shape(): size *= n
        header[name] = {"dtype": part.get_dtype(), "shape": part.get_shape(), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write(struct.pack("<Q", len(text)) + text)
    for name in source.keys():
        target.write(source.get_tensor(name).reshape(-1).view(torch.uint8).numpy().data)
    target.flush()
    os.fsync(target.fileno())
"""


def make_model(folder: Path, size: str, layers: int) -> None:
    """A Llama of random bf16 weights, in a process of its own so that this one stays small."""
    keys = {**MODELS[size], "num_layers": layers, "vocab_size": VOCABULARY[size], "max_position_embeddings": 2048}
    code = f"""
import json, torch
from pathlib import Path
from megagpt.convert.family import TokenIds
from megagpt.convert.llama_families import LLAMA
from megagpt.convert.safetensors_stream import write_safetensors
from megagpt.plan.config import ModelConfig
model = ModelConfig(**{keys!r})
pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
shapes = LLAMA.hf_shapes(model)
def make(name):
    count = 1
    for n in shapes[name]: count *= n
    start = hash(name) % (1 << 20)
    tensor = pool[start:].repeat(-(-count // (len(pool) - start)))[:count].reshape(shapes[name])
    yield tensor.abs() + 1 if "norm" in name else tensor
folder = Path({str(folder)!r})
folder.mkdir()
write_safetensors(folder / "model.safetensors", shapes, torch.bfloat16, make)
(folder / "config.json").write_text(json.dumps(LLAMA.hf_config(model, TokenIds(), "bfloat16")))
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONHASHSEED="0")
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


class Cost(NamedTuple):
    """What a process has cost."""

    seconds: float
    cpu_seconds: float
    peak_gb: float
    check_seconds: float
    check_cpu_seconds: float


def run(what: str, *arguments: str, threads: int) -> Cost:
    """Run a process and measure it."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES="")
    with tempfile.NamedTemporaryFile("r") as report:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", WRAPPER, report.name, what, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if result.returncode:
            raise SystemExit(f"{what.splitlines()[0]} failed:\n{result.stdout}{result.stderr}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        peak, *check = json.loads(Path(report.name).read_text())
        return Cost(seconds, cpu, peak * 1024 / 1e9, *check)


def one_round(work: Path, source: Path, threads: int) -> dict[str, Cost]:
    """All sides once, each beside a process that only imports."""
    number = len(list(work.iterdir()))
    made, back, copied = (work / f"{name}{number}" for name in ("made", "back", "copied"))
    found = {f"{side} imports": run(statement, threads=threads) for side, statement in IMPORTS.items()}
    found["copy"] = run(COPY, str(source / "model.safetensors"), str(copied), threads=threads)
    tools = str(ROOT / "tools")
    found["import"] = run(f"{tools}/convert_from_hf.py", "--input", str(source), "--output", str(made), threads=threads)
    checkpoint, arguments = str(made / "checkpoints"), ("--output", str(back), "--dtype", "bfloat16")
    found["export"] = run(f"{tools}/convert_to_hf.py", "--checkpoint", checkpoint, *arguments, threads=threads)
    for path in (made, back):
        subprocess.run(["rm", "-r", str(path)], check=True)
    copied.unlink()
    return found


def table(rounds: list[dict[str, Cost]]) -> list[str]:
    """Print a line per side, medians over the rounds; returns the goals that are missed."""
    print(
        f"{'side':<8}{'start-up s':>11}{'convert s':>11}{'x copy':>8}{'CPU s':>7}{'x copy':>8}{'check s':>9}"
        f"{'CPU s':>7}{'both x copy':>13}{'above imports GB':>18}"
    )

    def median(side: str, value: Callable[[Cost, Cost], float]) -> float:
        return statistics.median(value(found[side], found[f"{side} imports"]) for found in rounds)

    missed = []
    for side in ("copy", "import", "export"):
        startup = median(side, lambda _, start: start.seconds)
        both = median(side, lambda all_, start: all_.seconds - start.seconds)
        seconds = median(side, lambda all_, start: all_.seconds - start.seconds - all_.check_seconds)
        cpu = median(side, lambda all_, start: all_.cpu_seconds - start.cpu_seconds - all_.check_cpu_seconds)
        check, check_cpu = median(side, lambda a, _: a.check_seconds), median(side, lambda a, _: a.check_cpu_seconds)
        above = median(side, lambda all_, start: all_.peak_gb - start.peak_gb)
        if side == "copy":
            copy, copy_cpu = max(seconds, 1e-3), max(cpu, 1e-3)
        print(
            f"{side:<8}{startup:>11.1f}{seconds:>11.2f}{seconds / copy:>8.2f}{cpu:>7.2f}{cpu / copy_cpu:>8.2f}"
            f"{check:>9.2f}{check_cpu:>7.2f}{both / copy:>13.2f}{above:>18.3f}"
        )
        if side == "copy":
            continue
        for what, value, goal in (
            (f"{side}: memory above imports", above, MEMORY_GOAL_GB),
            (f"{side}: time of convert / copy", seconds / copy, TIME_GOAL),
        ):
            missed += judged(what, value, goal)
    return missed


def judged(what: str, value: float, goal: float) -> list[str]:
    """Print whether a goal is reached; what is missed."""
    print(f"    {what}: {value:.2f}, goal {goal}: {'reached' if value <= goal else 'MISSED'}")
    return [] if value <= goal else [what]


def above_imports(found: dict[str, Cost], side: str) -> float:
    """Peak memory of a side in GB beyond that of its imports."""
    return found[side].peak_gb - found[f"{side} imports"].peak_gb


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Import and export against a copy of the tensors: time and memory.",
        epilog="Exit status: 1 if a goal is missed.",
    )
    parser.add_argument("--size", choices=MODELS, default="1b", help="1b: 1.1 billion parameters, 2.2 GB in bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depths", action="store_true", help="measure memory of half as many layers, too")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (about 9 GB for 1b)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    layers = MODELS[args.size]["num_layers"]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        make_model(work / "hf", args.size, layers)
        gigabytes = (work / "hf" / "model.safetensors").stat().st_size / 1e9
        rounds = [one_round(work, work / "hf", args.threads) for _ in range(args.rounds)]
        half = None
        if args.depths:
            make_model(work / "half", args.size, layers // 2)
            half = one_round(work, work / "half", args.threads)
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "half": half}))
    print(f"{args.size}: {gigabytes:.2f} GB of bf16, {args.threads} threads, median of {args.rounds} rounds")
    missed = table(rounds)
    for side in ("import", "export"):
        if half is None:
            break
        deep = statistics.median(above_imports(found, side) for found in rounds)
        missed += judged(
            f"{side}: GB that {layers} layers need more than {layers // 2}",
            deep - above_imports(half, side),
            DEPTH_GOAL_GB,
        )
    print("all goals met" if not missed else "missed: " + "; ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
