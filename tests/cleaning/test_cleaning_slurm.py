"""Jobs of Slurm: a stand-in for sbatch runs the batch files as they are, arrays and all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from planted_corpus import records, write_jsonl

from megagpt.cleaning.job import Job, run_job
from megagpt.cleaning.recipe import load_recipe

ROOT = Path(__file__).parents[2]
# Runs the tasks of an array in turn; a job whose predecessor has failed is refused, as by afterok.
SBATCH = """#!{python}
import json, os, re, subprocess, sys
folder = os.path.dirname(os.path.abspath(__file__))
log = os.path.join(folder, "jobs.json")
jobs = json.load(open(log)) if os.path.exists(log) else []
number = str(100 + len(jobs))
script = open(sys.argv[-1]).read()
wanted = dict(arg[2:].split("=", 1) for arg in sys.argv[1:-1])
needed = re.findall("afterok:([0-9]+)", wanted.get("dependency", ""))
codes = [] if all(job["ok"] for job in jobs if job["id"] in needed) else [1]
first, last = map(int, re.search("--array=([0-9]+)-([0-9]+)", script).groups())
for task in range(first, last + 1) if not codes else ():
    environ = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", RUN_OFFSET="0")
    done = subprocess.run(["bash", sys.argv[-1]], env=environ, capture_output=True, text=True)
    codes.append(done.returncode)
    print(done.stdout[-3000:], done.stderr[-3000:], file=open(os.path.join(folder, "out.txt"), "a"))
name = re.search("--job-name=(.*)", script)[1]
jobs.append(dict(id=number, name=name, ok=not any(codes), needed=needed, script=script))
json.dump(jobs, open(log, "w"))
print("Submitted batch job " + number)
"""
STAND_INS = {
    "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',  # -l -n 1
    "scontrol": "#!/bin/bash\necho here\n",
    "squeue": "#!/bin/bash\ncat $(dirname $0)/busy 2>/dev/null || exit 1\n",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, script in {**STAND_INS, "sbatch": SBATCH.replace("{python}", sys.executable)}.items():
        (bin_folder / name).write_text(script)
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return bin_folder


def test_slurm_gives_the_same_result(slurm, tmp_path, monkeypatch):
    overrides = ["near_duplicates.buckets=2", "near_duplicates.hashes_per_bucket=4", "language=false"]
    write_jsonl(tmp_path / "in.jsonl", [*records(), {"tekst": "no text"}])
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, ROOT / "tools/clean_data.py", "--input", "in.jsonl", "--output", "out", *overrides]
    command += ["--slurm", "cpu", "--tasks-per-job", "2", "--sbatch", "account=me"]

    def run(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=250, check=False)

    shown = run("--slurm-print")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("#SBATCH --account=me") == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "in.jsonl"]

    failed = run()
    assert failed.returncode == 0, failed.stderr
    jobs = json.loads((slurm / "jobs.json").read_text())
    assert [job["name"] for job in jobs] == [
        f"megagpt-{stage}" for stage in ("clean", "equal", "alike", "groups", "shards", "finish")
    ]
    assert [job["needed"] for job in jobs] == [[], *([job["id"]] for job in jobs[:-1])]
    assert not any(job["ok"] for job in jobs)
    assert "in.jsonl:46: no key 'text'" in (slurm / "out.txt").read_text()
    assert not list(tmp_path.rglob("*.pik")), "nothing is left to unpickle"

    (slurm / "busy").write_text("103\n")
    refused = run()
    assert refused.returncode == 2
    assert "jobs 103 are at work on it; wait for them, or scancel 103" in refused.stderr
    (slurm / "busy").unlink()

    again = run("--on-bad-line", "skip")
    assert again.returncode == 0, again.stderr
    assert "submitted jobs 106, 107, 108, 109, 110, 111" in again.stdout
    assert all(job["ok"] for job in json.loads((slurm / "jobs.json").read_text())[6:]), (slurm / "out.txt").read_text()
    alone = Job([Path("in.jsonl")], tmp_path / "alone", load_recipe("web", overrides), on_bad_line="skip")
    report = run_job(alone)
    (shard,) = report.shards
    assert (tmp_path / "out" / shard.name).read_bytes() == (tmp_path / "alone" / shard.name).read_bytes()
    assert not (tmp_path / "out.work").exists()
    assert "nothing to do" in run("--on-bad-line", "skip").stderr
