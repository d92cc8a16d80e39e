"""Jobs: the same result however it was shared out, interrupted jobs, refusals, and nothing half-written."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
import zstandard
from planted_corpus import prose, records, write_jsonl
from pyarrow import parquet

import megagpt.cleaning.executors
import megagpt.data.work
from megagpt.cleaning.job import Job, run_job
from megagpt.cleaning.recipe import load_recipe
from megagpt.data.work import WorkFolder
from megagpt.errors import DataError

ROOT = Path(__file__).parents[2]


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines_of(folder):
    return [line for path in sorted(folder.iterdir()) for line in gzip.open(path)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two files, the second with copies of documents of the first."""
    folder = tmp_path_factory.mktemp("corpus")
    again = [{"id": f"again {seed}", "text": prose(seed).replace("The ", "One ", seed % 2)} for seed in range(0, 30, 3)]
    write_jsonl(folder / "1.jsonl", records())
    write_jsonl(folder / "2.jsonl", [*again, *({"id": f"new {n}", "text": prose(n)} for n in range(50, 80))])
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The result of a job in one process and one task."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_job(Job([corpus], output, load_recipe("web")))
    return output


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(megagpt.data.work, "_SMALLEST_UNIT_BYTES", 9000)


def test_the_result_does_not_depend_on_tasks_nor_workers(corpus, whole, tmp_path, small_units):
    reports = [
        run_job(Job([corpus], tmp_path / name, load_recipe("web")), workers=workers)
        for name, workers in (("one", 1), ("two", 2))
    ]
    assert len(reports[0].shards) > 5
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    for report in reports:
        for step in report.steps.values():
            step.pop("seconds")
    assert reports[0] == reports[1]
    assert bytes_of(tmp_path / "one.report/dropped") == bytes_of(tmp_path / "two.report/dropped")
    assert lines_of(tmp_path / "one") == lines_of(whole)
    assert {name: data for name, data in bytes_of(tmp_path / "one.report").items() if name != "report.json"} == {
        name: data for name, data in bytes_of(Path(f"{whole}.report")).items() if name != "report.json"
    }


def test_a_killed_job_goes_on(corpus, whole, tmp_path, small_units, monkeypatch, capsys):
    output, log = tmp_path / "out", []
    run_task = megagpt.cleaning.executors.LocalStage.run_task

    def dying(executor, rank):
        log.append((executor._stage.name, rank))
        if deaths and log[-1] == deaths[0]:
            raise KeyboardInterrupt
        return run_task(executor, rank)

    monkeypatch.setattr(megagpt.cleaning.executors.LocalStage, "run_task", dying)
    job = Job([corpus], output, load_recipe("web"))
    deaths = [("clean", 4), ("alike", 3), ("shards", 2)]
    while deaths:
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
        assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
        del deaths[0]
    run_job(job)
    assert "going on, 4 of" in capsys.readouterr().err
    assert len(log) == len(set(log)) + 3, "only the task that died is done again"
    assert lines_of(output) == lines_of(whole)


def test_sigkill_of_a_worker_is_told_and_survived(corpus, whole, tmp_path):
    command = [sys.executable, "tools/clean_data.py", "--input", str(corpus), "--output", str(tmp_path / "out")]
    run = subprocess.Popen(
        [*command, "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "out.work/stages/clean/logs/task_00000.log"
    for _ in range(600):
        if log.exists() or run.poll() is not None:
            break
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    if workers and run.returncode:
        assert run.returncode == 2
        assert errors.strip().splitlines()[-1].startswith("error: a worker process was killed")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert lines_of(tmp_path / "out") == lines_of(whole)


def test_a_finished_output_is_not_made_again(corpus, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    recipe = load_recipe("web", ["language=false", "near_duplicates=false"])
    report = run_job(Job([corpus / "1.jsonl"], output, recipe))
    before = bytes_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(megagpt.cleaning.executors.LocalStage, "run", lambda _: pytest.fail("made again"))
        assert run_job(Job([corpus / "1.jsonl"], output, recipe)) == report
    assert "nothing to do" in capsys.readouterr().err
    other = load_recipe("web", ["language=false", "near_duplicates=false", "quality.min_words=60"])
    with pytest.raises(DataError, match=r"made differently \(quality.min_words: 50 before, 60 now\); pass --overwrite"):
        run_job(Job([corpus / "1.jsonl"], output, other))
    with pytest.raises(DataError, match="the inputs have changed"):
        run_job(Job([corpus], output, recipe))
    assert bytes_of(tmp_path) == before
    (output / report.shards[0].name).write_bytes(b"cut")
    with pytest.raises(DataError, match="has 3 bytes instead of"):
        run_job(Job([corpus / "1.jsonl"], output, recipe))
    run_job(Job([corpus / "1.jsonl"], output, other, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.report"]


def test_what_others_made_is_never_touched(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="was not made by this command; choose another --output"):
            run_job(Job([corpus], tmp_path / "out", load_recipe("web"), overwrite=overwrite))
    assert bytes_of(tmp_path) == {"out/precious.txt": b"mine"}


def test_two_jobs_with_one_output_are_refused(corpus, tmp_path):
    job = Job([corpus], tmp_path / "out", load_recipe("web"))
    with (
        WorkFolder(job.output).taken_by(0, megagpt.cleaning.job._plan(job)),
        pytest.raises(DataError, match=r"process \d+ on .* is writing this dataset"),
    ):
        run_job(job)


def test_a_changed_recipe_begins_again(corpus, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(megagpt.cleaning.job, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run_job(Job([corpus / "1.jsonl"], tmp_path / "out", load_recipe("web")))
    report = run_job(Job([corpus / "1.jsonl"], tmp_path / "out", load_recipe("web", ["c4=false"])))
    assert "unfinished work of another kind was removed (c4: True before, False now" in capsys.readouterr().err
    assert "c4" not in report.steps


def bad_utf8(path):
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')


def no_key(path):
    path.write_text('{"text": "fine"}\n{"body": "x"}\n')


def broken(path):
    path.write_text('{"text": "fine"}\n{"text": "x"\n')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bad_utf8, r"in.jsonl:2: byte \d+ of the line is not UTF-8; mend the line or pass --on-bad-line skip"),
        (no_key, r"in.jsonl:2: no key 'text' \(keys: 'body'\)"),
        (broken, r"in.jsonl:2: not JSON"),
    ],
)
def test_bad_lines(tmp_path, damage, message):
    damage(tmp_path / "in.jsonl")
    recipe = load_recipe("web", ["quality=false", "repetition=false", "language=false", "c4=false"])
    with pytest.raises(DataError, match=message):
        run_job(Job([tmp_path / "in.jsonl"], tmp_path / "out", recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    report = run_job(Job([tmp_path / "in.jsonl"], tmp_path / "out", recipe, on_bad_line="skip"))
    assert report.steps["read"]["dropped"]["bad line"]["documents"] == 1
    assert report.kept["documents"] == 1


def test_nothing_left_is_an_error_with_a_report(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"text": "too short"}])
    with pytest.raises(DataError, match=r"no document is left of 1; .*out.report says why"):
        run_job(Job([tmp_path / "in.jsonl"], tmp_path / "out", load_recipe("web")))
    assert "min_words" in (tmp_path / "out.report/report.txt").read_text()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_inputs_of_all_kinds(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(prose(1))
    line = json.dumps({"text": prose(2), "n": 2}).encode() + b"\n"
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(line))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(line.replace(b'"n": 2', b'"n": 3')))
    parquet.write_table(pyarrow.table({"n": [4, 5], "text": [prose(4), prose(1)]}), folder / "d.parquet")
    (folder / "long.jsonl").write_text(json.dumps({"text": "far too long " * 800_000}) + "\n")
    report = run_job(Job([folder], tmp_path / "out", load_recipe("web"), compression="zst"))
    (shard,) = (tmp_path / "out").iterdir()
    rows = [json.loads(row) for row in zstandard.decompress(shard.read_bytes(), 1 << 20).splitlines()]
    assert [row["text"] for row in rows] == [prose(1), prose(2), prose(4)]
    assert [row.get("n") for row in rows] == [None, 2, 4]
    assert report.steps["read"]["dropped"] == {"over 8 MiB": {"documents": 1, "bytes": 10_400_013}}
    duplicates = report.steps["exact_duplicates"]["dropped"]["exact duplicate"]["documents"]
    assert duplicates == 2, "of a text file in a table, and of a compressed line in another file"
