"""Inputs of all kinds give the same dataset; very long ones in bounded memory; what is unusable is named."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megagpt.data import documents, encode, long_lines, long_texts
from megagpt.data.documents import iter_texts
from megagpt.data.indexed import IndexedDataset, bin_path, idx_path
from megagpt.data.preprocess import Job, preprocess, run_job
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import DataError

TEXTS = [f"Document {i} says that {i} times {i} is {i * i}.\n" * (i % 5 + 1) for i in range(300)]
LINES = "".join(json.dumps({"text": text, "title": f"Title {i}"}) + "\n" for i, text in enumerate(TEXTS)).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t", 320)


@pytest.fixture(scope="module")
def expected(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    (folder / "in.jsonl").write_bytes(LINES)
    preprocess([folder / "in.jsonl"], folder / "d", tokenizer.path)
    return files(folder / "d")


def files(prefix):
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def write_parquet(path):
    table = pyarrow.table({"text": TEXTS, "number": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, path, row_group_size=70)


def write_text_files(folder):
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    (folder / ".hidden.txt").write_text("no")
    (folder / "picture.png").write_text("no")


INPUTS = {
    "in.jsonl": lambda path: path.write_bytes(LINES),
    "in.json": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n\n")),
    "in.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:])),
    "in.ndjson.zst": lambda path: path.write_bytes(
        zstandard.compress(LINES[:5000]) + zstandard.ZstdCompressor().compress(LINES[5000:])
    ),
    "in.parquet": write_parquet,
    "folder": write_text_files,
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("unit_bytes", [1000, 1 << 20])
def test_all_kinds_give_the_same(name, unit_bytes, tokenizer, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.work._SMALLEST_UNIT_BYTES", unit_bytes)
    INPUTS[name](tmp_path / name)
    preprocess([tmp_path / name], tmp_path / "d", tokenizer.path)
    assert files(tmp_path / "d") == expected
    assert list(iter_texts([str(tmp_path / name)])) == TEXTS


def test_folders_globs_and_formats_by_option(tokenizer, expected, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name, lines in (("deep/a.data", LINES[:5044]), ("deep/er/b.data", LINES[5044:])):
        (tmp_path / name).write_bytes(lines)
    assert LINES[5043:5044] != b"\n"
    cut = LINES.index(b"\n", 5000) + 1
    (tmp_path / "deep/a.data").write_bytes(LINES[:cut])
    (tmp_path / "deep/er/b.data").write_bytes(LINES[cut:])
    for number, given in enumerate((["deep"], ["deep/**/*.data"], ["deep/a.data", "deep/er"])):
        paths = [tmp_path / name for name in given]
        preprocess(paths, tmp_path / f"d{number}", tokenizer.path, input_format="jsonl")
        assert files(tmp_path / f"d{number}") == expected


def test_several_keys_make_aligned_datasets(tokenizer, expected, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(LINES + b'{"text": "", "title": "left out"}\n')
    job = Job([tmp_path / "in.jsonl"], tmp_path / "d", tokenizer.path, text_keys=["title", "text"])
    titles, texts = run_job(job)
    assert (titles.text_key, texts.text_key, texts.skipped_short) == ("title", "text", 1)
    assert files(tmp_path / "d_text_document") == expected
    dataset = IndexedDataset(tmp_path / "d_title_document")
    assert tokenizer.decode(dataset.document(7)) == "Title 7"
    assert dataset.num_documents == len(TEXTS)


@pytest.mark.parametrize(("min_length", "kept"), [(0, ["", "a", "bc", "def"]), (1, ["a", "bc", "def"]), (3, ["def"])])
def test_shortest_document(min_length, kept, tokenizer, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ["", "a", "bc", "def"])
    (tmp_path / "in.jsonl").write_text(lines)
    manifest = preprocess([tmp_path / "in.jsonl"], tmp_path / "d", tokenizer.path, min_length=min_length)
    dataset = IndexedDataset(tmp_path / "d")
    assert [tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)] == kept
    assert manifest.skipped_short == 4 - len(kept)


def test_empty_documents_are_megatrons(tokenizer, tmp_path):
    """Its preprocess_data.py writes a document without sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    texts = ["", "one", "", "", "two two", ""]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([tmp_path / "in.jsonl"], tmp_path / "d", tokenizer.path, min_length=0)
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "m")), dtype=np.uint16)
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eod_id] if text else []
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(idx_path(tmp_path / "m")))
    assert files(tmp_path / "d") == files(tmp_path / "m")


@pytest.fixture
def small_bounds(monkeypatch):
    monkeypatch.setattr(documents, "LONG_BYTES", 3000)
    monkeypatch.setattr(long_lines, "LONG_STRING_BYTES", 500)
    monkeypatch.setattr(long_lines, "_CHUNK_BYTES", 700)
    monkeypatch.setattr(documents, "_CHUNK_BYTES", 700)
    for module in (long_texts, encode):
        monkeypatch.setattr(module, "LONG_CHARACTERS", 2500)
    monkeypatch.setattr("megagpt.data.work._SMALLEST_UNIT_BYTES", 5000)


LONG = ["".join(TEXTS[:90]), *TEXTS[:9], "word " * 700, "".join(TEXTS[100:200]) + "é漢"]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "folder", "in.parquet"])
def test_long_documents_are_cut_without_a_trace(name, tokenizer, tmp_path, request):
    lines = "".join(json.dumps({"other": text[::-1], "text": text}) + "\n" for text in LONG).encode()
    if name == "folder":
        (tmp_path / name).mkdir()
        for i, text in enumerate(LONG):
            (tmp_path / name / f"{i:03}.md").write_bytes(text.encode())
    elif name == "in.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": LONG}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    preprocess([tmp_path / name], tmp_path / "whole", tokenizer.path)
    request.getfixturevalue("small_bounds")
    preprocess([tmp_path / name], tmp_path / "cut", tokenizer.path)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert list(iter_texts([str(tmp_path / name)])) == LONG


@pytest.mark.parametrize("bad", [b"\\q", b"\xff", b"\\ud800", b'", "text": "\n'])
def test_faults_of_long_lines_are_named_or_skipped(bad, tokenizer, tmp_path, small_bounds):
    long = json.dumps({"text": LONG[0]}).encode()
    damaged = long[:4000] + bad + long[4000:]
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "one"}\n' + long + b"\n" + damaged + b'\n{"text": "two"}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:3: .*; mend the line or pass --on-bad-line skip"):
        preprocess([tmp_path / "in.jsonl"], tmp_path / "d", tokenizer.path)
    manifest = preprocess([tmp_path / "in.jsonl"], tmp_path / "d", tokenizer.path, on_bad_line="skip")
    dataset = IndexedDataset(tmp_path / "d")
    found = [tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)]
    assert found == ["one", LONG[0], "two"]
    assert manifest.skipped_bad >= 1


def test_a_text_that_cannot_be_cut_is_named_or_skipped(tokenizer, tmp_path, small_bounds):
    (tmp_path / "a.txt").write_text("many words " * 50)
    (tmp_path / "b.txt").write_text("x" * 120000)
    (tmp_path / "c.txt").write_bytes(b"good words " * 400 + b"\xff" + b" good words" * 400)
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    with pytest.raises(DataError, match=r"b\.txt: \d+ characters of a long text without a place to cut"):
        preprocess(paths[:2], tmp_path / "d", tokenizer.path)
    with pytest.raises(DataError, match=r"c\.txt: byte 4400 is not UTF-8"):
        preprocess([paths[0], paths[2]], tmp_path / "d", tokenizer.path)
    manifest = preprocess(paths, tmp_path / "d", tokenizer.path, on_bad_line="skip")
    assert (manifest.num_documents, manifest.skipped_bad) == (1, 2)


def put(path, content):
    path.write_bytes(content)
    return path


PARQUET_END = b"PAR1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"a\.csv does not end in \.jsonl, .* rename it or say what it holds by --input-format"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: the compressed data is damaged or cut off"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz: the compressed data is damaged or cut off"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-20], r"a\.jsonl\.zst: the compressed data is damaged or cut off"),
        ("a.jsonl.zst", b"not zstd at all", r"a\.jsonl\.zst: the compressed data is damaged or cut off"),
        ("a.parquet", b"not parquet", r"a\.parquet is not a readable Parquet file"),
        ("a.txt", b"\xff\xfe", r"a\.txt: byte 0 is not UTF-8; mend the line or pass --on-bad-line skip"),
    ],
)
def test_damaged_inputs(name, content, message, tokenizer, tmp_path):
    path = put(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        preprocess([path], tmp_path / "d", tokenizer.path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parquet_faults(tokenizer, tmp_path):
    table = pyarrow.table({"text": ["one", None, "three"], "number": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 1: the value of 'text' is null"):
        preprocess([tmp_path / "a.parquet"], tmp_path / "d", tokenizer.path)
    with pytest.raises(DataError, match=r"has no column 'body' \(columns: text, number\)"):
        preprocess([tmp_path / "a.parquet"], tmp_path / "d", tokenizer.path, text_keys=["body"])
    with pytest.raises(DataError, match=r"column 'number' does not hold strings but int64"):
        preprocess([tmp_path / "a.parquet"], tmp_path / "d", tokenizer.path, text_keys=["number"])
    manifest = preprocess([tmp_path / "a.parquet"], tmp_path / "d", tokenizer.path, on_bad_line="skip")
    assert (manifest.num_documents, manifest.skipped_bad) == (2, 1)


def test_names_that_stand_for_nothing_or_twice(tokenizer, tmp_path):
    put(tmp_path / "a.jsonl", LINES)
    (tmp_path / "empty").mkdir()
    for given, message in (
        (["empty"], r"input folder .*empty holds no file"),
        (["*.txt"], r"input .*\*\.txt stands for no file"),
        (["a.jsonl", "*.jsonl"], r"a\.jsonl is given twice"),
    ):
        with pytest.raises(DataError, match=message):
            preprocess([tmp_path / name for name in given], tmp_path / "d", tokenizer.path)
    for keys in ([], ["text", "text"]):
        with pytest.raises(DataError, match="text keys"):
            preprocess([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer.path, text_keys=keys)


def test_parts_inside_of_a_long_line_read_no_further_than_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK_BYTES", 100)
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "' + b"x" * 100_000 + b'"}\n')
    with (tmp_path / "in.jsonl").open("rb") as file:
        assert 2000 <= documents._skip_to_line_start(file, 1000, 2000) < 2200
        assert file.tell() < 2200
    (source,) = documents.find_inputs([tmp_path / "in.jsonl"])
    assert list(documents.read_documents(source, 1000, 2000, ["text"])) == []
