"""Jobs: killed, continued, shared out over ranks, locked, complete already, changed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.data import work
from megagpt.data.indexed import bin_path, idx_path
from megagpt.data.job_rank import JobRank, find_job_rank
from megagpt.data.manifest import manifest_path, read_manifest
from megagpt.data.preprocess import Job, preprocess, run_job
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import DataError, LaunchError

TEXTS = [f"Document {i} says that {i} times {i} is {i * i}.\n" * (i % 5 + 1) for i in range(600)]
TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    train_sentencepiece(TEXTS, folder / "t", 320)
    for name, texts in (("a", TEXTS[:400]), ("b", TEXTS[400:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([folder / "*.jsonl"], folder / "whole", folder / "t.model")
    preprocess([folder / "*.jsonl"], folder / "shuffled", folder / "t.model", seed=5)
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(work, "_SMALLEST_UNIT_BYTES", 4000)


def job(corpus, tmp_path, **options):
    return Job([corpus / "*.jsonl"], tmp_path / "d", corpus / "t.model", **options)


def same_files(left, right):
    return all(path(left).read_bytes() == path(right).read_bytes() for path in (bin_path, idx_path))


@pytest.mark.parametrize("seed", [None, 5])
def test_ranks_in_any_order_make_the_same_bytes(corpus, tmp_path, seed):
    for rank in (2, 0, 1):
        made = run_job(job(corpus, tmp_path, seed=seed), ranks=JobRank(rank, 3))
        assert (made == []) == (rank != 1)
    expected = corpus / ("whole" if seed is None else "shuffled")
    assert same_files(tmp_path / "d", expected)
    assert manifest_path(tmp_path / "d").read_bytes() == manifest_path(expected).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_another_number_of_ranks_goes_on(corpus, tmp_path, capsys):
    assert run_job(job(corpus, tmp_path), ranks=JobRank(1, 3)) == []
    units = sorted((tmp_path / "d.work").glob("0*.json"))
    before = [path.stat().st_mtime_ns for path in units]
    assert len(run_job(job(corpus, tmp_path), ranks=JobRank(0, 2))) == 0
    assert "going on, " in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in units] == before
    assert len(run_job(job(corpus, tmp_path), workers=2)) == 1
    assert same_files(tmp_path / "d", corpus / "whole")


def start_tool(corpus, tmp_path, *options, **environ):
    code = (
        "import sys, runpy; from megagpt.data import work; work._SMALLEST_UNIT_BYTES = 4000;"
        f"sys.argv[0] = {str(TOOL)!r}; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    arguments = ["--input", corpus / "*.jsonl", "--output-prefix", tmp_path / "d", "--tokenizer", corpus / "t.model"]
    command = [sys.executable, "-c", code, *map(str, [*arguments, *options])]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}
    )


@pytest.mark.parametrize("kills", [[1, 4, 9]])
def test_killed_at_any_moment(corpus, tmp_path, kills):
    """Killed after so many units; in the end the bytes are those of an undisturbed job."""
    for count in kills:
        process = start_tool(corpus, tmp_path)
        while process.poll() is None and len([*(tmp_path / "d.work").glob("0*.json")]) < count:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not bin_path(tmp_path / "d").exists() or read_manifest(tmp_path / "d")
    process = start_tool(corpus, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert same_files(tmp_path / "d", corpus / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_killed_in_the_merge(corpus, tmp_path, monkeypatch):
    import megagpt.data.preprocess as module

    original = module.IndexedWriter.close

    def die(self):
        (tmp_path / ".d.bin.999.tmp").write_bytes(b"left by another process")
        raise KeyboardInterrupt

    monkeypatch.setattr(module.IndexedWriter, "close", die)
    with pytest.raises(KeyboardInterrupt):
        run_job(job(corpus, tmp_path))
    monkeypatch.setattr(module.IndexedWriter, "close", original)
    run_job(job(corpus, tmp_path))
    assert same_files(tmp_path / "d", corpus / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_a_full_disk_does_not_harm_the_old_dataset(corpus, tmp_path, monkeypatch):
    import megagpt.data.preprocess as module

    old = run_job(job(corpus, tmp_path))

    def fill(self, file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(module.IndexedWriter, "_write_index", fill)
        with pytest.raises(DataError, match="No space left on device"):
            run_job(job(corpus, tmp_path, append_eod=False, overwrite=True))
    assert run_job(job(corpus, tmp_path)) == old
    assert same_files(tmp_path / "d", corpus / "whole")


def test_a_full_disk_keeps_what_is_done(corpus, tmp_path, monkeypatch):
    from megagpt.data import encode

    original = encode._Output.close
    calls = []

    def fill(self):
        calls.append(1)
        original(self)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode._Output, "close", fill)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); .* start again to go on"):
        run_job(job(corpus, tmp_path))
    assert not bin_path(tmp_path / "d").exists()
    assert len([*(tmp_path / "d.work").glob("0*.json")]) == 4
    run_job(job(corpus, tmp_path))
    assert same_files(tmp_path / "d", corpus / "whole")


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(
    ("name", "keep"),
    [("00000001.0.tokens", 3), ("00000001.0.lengths", 0), ("00000001.json", 0), ("input-00000000.json", 0)],
)
def test_what_a_crash_of_the_machine_has_emptied_is_made_anew(corpus, tmp_path, name, keep, seed):
    """Units are not waited for until they are on the disk."""
    wanted = job(corpus, tmp_path, seed=seed)
    for rank in (0, 1):
        assert run_job(wanted, ranks=JobRank(rank, 3)) == []
    os.truncate(tmp_path / "d.work" / name, keep)
    with pytest.raises(DataError, match=r"is not as it was written .*; start again to do this part anew"):
        run_job(wanted, ranks=JobRank(2, 3))
    assert not bin_path(tmp_path / "d").exists()
    units = {path.name for path in (tmp_path / "d.work").glob("0*.json")}
    run_job(wanted)
    assert len(units) > 3
    assert same_files(tmp_path / "d", corpus / ("whole" if seed is None else "shuffled"))


def test_a_complete_dataset_is_left_alone(corpus, tmp_path, capsys):
    made = run_job(job(corpus, tmp_path))
    before = bin_path(tmp_path / "d").stat().st_mtime_ns
    assert run_job(job(corpus, tmp_path), workers=2) == made
    assert "is complete already" in capsys.readouterr().err
    assert bin_path(tmp_path / "d").stat().st_mtime_ns == before


def test_a_changed_option_or_input_is_noticed(corpus, tmp_path):
    own = tmp_path / "c.jsonl"
    own.write_text('{"text": "one"}\n')
    made = preprocess([own], tmp_path / "d", corpus / "t.model")
    with pytest.raises(DataError, match=r"made differently \(append_eod: True before, False now\); pass --overwrite"):
        preprocess([own], tmp_path / "d", corpus / "t.model", append_eod=False)
    os.utime(own, ns=(1, 1))  # touched, but the same content
    assert preprocess([own], tmp_path / "d", corpus / "t.model") == made
    own.write_text('{"text": "two"}\n')
    with pytest.raises(DataError, match=r"made differently \(the inputs have changed\)"):
        preprocess([own], tmp_path / "d", corpus / "t.model")
    assert read_manifest(tmp_path / "d") == made
    assert preprocess([own], tmp_path / "d", corpus / "t.model", overwrite=True) != made


def test_unfinished_work_of_another_kind_is_not_mixed_in(corpus, tmp_path, capsys):
    run_job(job(corpus, tmp_path, append_eod=False), ranks=JobRank(0, 2))
    run_job(job(corpus, tmp_path))
    assert "unfinished work of another kind was removed (append_eod: False before, True now)" in capsys.readouterr().err
    assert same_files(tmp_path / "d", corpus / "whole")


def test_files_of_unknown_origin_are_not_replaced(corpus, tmp_path):
    bin_path(tmp_path / "d").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"d\.bin exists, of unknown origin; pass --overwrite"):
        run_job(job(corpus, tmp_path))
    assert bin_path(tmp_path / "d").read_bytes() == b"precious"
    run_job(job(corpus, tmp_path, overwrite=True))
    assert same_files(tmp_path / "d", corpus / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": -5}, "--min-length -5 is negative"),
        ({"prefix": "folder/"}, "--output-prefix .*folder/ is a folder; add a name, as .*folder/dataset"),
        ({"text_keys": ("body",)}, r"a\.jsonl:1: no key 'body' \(keys: 'text'\); name the text's key by --json-keys"),
    ],
)
def test_options_that_cannot_be(corpus, tmp_path, options, message):
    (tmp_path / "folder").mkdir()
    if "prefix" in options:
        options = {"prefix": f"{tmp_path}/{options['prefix']}"}
    with pytest.raises(DataError, match=message):
        run_job(dataclasses.replace(job(corpus, tmp_path), **options))
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_two_jobs_or_a_rank_twice(corpus, tmp_path):
    wanted = job(corpus, tmp_path)
    folder = work.WorkFolder(tmp_path / "d")
    plan = work.Plan({}, [], [], 2)
    with folder.taken_by(0, plan):
        with pytest.raises(DataError, match=r"process \d+ on .* is writing this dataset as rank 0 of 1; wait for it"):
            run_job(wanted)
        with pytest.raises(DataError, match=r"as rank 0 of 2"):
            run_job(wanted, ranks=JobRank(0, 2))
        with pytest.raises(DataError, match=r"rank 0 of this job makes something else \(the inputs have changed\)"):
            run_job(wanted, ranks=JobRank(1, 2))
        with pytest.raises(DataError, match=r"as rank 0 of 2"):
            run_job(wanted, ranks=JobRank(2, 3))
        assert folder.path.is_dir()
    run_job(wanted)
    assert same_files(tmp_path / "d", corpus / "whole")


def test_a_killed_worker_is_told(corpus, tmp_path, monkeypatch):
    process = start_tool(corpus, tmp_path, "--workers", "2")
    while process.poll() is None and not [*(tmp_path / "d.work").glob("0*.json")]:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if workers:
        os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 or "a worker process was killed, most often for want of memory" in err
    run_job(job(corpus, tmp_path))
    assert same_files(tmp_path / "d", corpus / "whole")


def test_mpirun_shares_the_work(corpus, tmp_path):
    """What mpirun sets in its ranks (started here without it)."""
    ranks = [
        start_tool(corpus, tmp_path, OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_SIZE="3") for rank in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0], outputs
    assert same_files(tmp_path / "d", corpus / "whole")
    assert sum("600 documents" in out for out, _ in outputs) == 1


ARRAY = {
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_STEP": "2",
}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        (ARRAY, (2, 4)),
        ({**ARRAY, **STEP}, (5, 8)),
        ({**STEP, "SLURM_STEP_ID": "0"}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script itself
        ({**STEP, "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4)),
    ],
)
def test_ranks_of_launchers(environ, expected):
    assert find_job_rank(environ=environ) == JobRank(*expected)
    assert find_job_rank(1, 5, environ) == JobRank(1, 5)


@pytest.mark.parametrize(
    ("rank", "size", "environ", "message"),
    [
        (0, None, {}, "--rank and --world-size belong together"),
        (3, 3, {}, "--rank=3 is outside"),
        (None, None, {"PMI_RANK": "x", "PMI_SIZE": "4"}, "PMI_RANK=x is no number"),
        (None, None, {"PMI_RANK": "4", "PMI_SIZE": "4"}, "PMI_RANK=4 is outside"),
        (None, None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "90"}, "not one of 4 tasks in even steps"),
    ],
)
def test_contradicting_ranks(rank, size, environ, message):
    with pytest.raises(LaunchError, match=message):
        find_job_rank(rank, size, environ)
