"""Text files to datasets: same bytes for any number of workers, bad lines named, nothing half-written."""

import hashlib
import json

import pytest

import megagpt
from megagpt.data.indexed import IndexedDataset, bin_path, idx_path
from megagpt.data.manifest import manifest_path, read_manifest, verify_files
from megagpt.data.preprocess import preprocess
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import DataError

TEXTS = [f"Document {i} says that {i} times {i} is {i * i}.\n" * (i % 5 + 1) for i in range(600)]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t", 320)


@pytest.fixture
def inputs(tmp_path):
    return [write_lines(tmp_path / "a.jsonl", TEXTS[:400]), write_lines(tmp_path / "b.jsonl", TEXTS[400:])]


def documents(prefix, tokenizer):
    dataset = IndexedDataset(prefix)
    ids = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert all(document[-1] == tokenizer.eod_id and tokenizer.eod_id not in document[:-1] for document in ids)
    return [tokenizer.decode(document) for document in ids]


def test_documents_come_back_in_order(inputs, tokenizer, tmp_path):
    manifest = preprocess(inputs, tmp_path / "out" / "d", tokenizer.path)
    assert documents(tmp_path / "out" / "d", tokenizer) == TEXTS
    assert manifest.num_documents == 600
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_manifest(inputs, tokenizer, tmp_path):
    manifest = preprocess(inputs, tmp_path / "d", tokenizer.path, seed=3)
    assert read_manifest(tmp_path / "d") == manifest == verify_files(tmp_path / "d")
    assert manifest.megagpt_version == megagpt.__version__
    assert (manifest.tokenizer_file, manifest.tokenizer_sha256) == ("t.model", tokenizer.sha256)
    assert (manifest.vocab_size, manifest.dtype, manifest.append_eod, manifest.seed) == (320, "uint16", True, 3)
    assert manifest.num_tokens == IndexedDataset(tmp_path / "d").num_tokens
    assert [file.path for file in manifest.inputs] == [str(path) for path in inputs]
    for file, path in zip(manifest.inputs, inputs, strict=True):
        assert (file.bytes, file.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("seed", [None, 7])
def test_bytes_do_not_depend_on_workers(inputs, tokenizer, tmp_path, monkeypatch, seed):
    monkeypatch.setattr("megagpt.data.work._SMALLEST_UNIT_BYTES", 1000)
    for workers in (1, 2):
        preprocess(inputs, tmp_path / f"d{workers}", tokenizer.path, workers=workers, seed=seed)
    for path in (bin_path, idx_path, manifest_path):
        assert path(tmp_path / "d1").read_bytes() == path(tmp_path / "d2").read_bytes()


def test_tasks_do_not_change_the_documents(inputs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.work._SMALLEST_UNIT_BYTES", 101)
    preprocess(inputs, tmp_path / "d", tokenizer.path)
    assert documents(tmp_path / "d", tokenizer) == TEXTS


def test_shuffling(inputs, tokenizer, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        preprocess(inputs, tmp_path / name, tokenizer.path, seed=seed)
    a, b, c = (documents(tmp_path / name, tokenizer) for name in "abc")
    assert a == b
    assert a != c
    assert sorted(a) == sorted(c) == sorted(TEXTS)
    assert a != TEXTS
    # Documents of both files are mixed.
    assert 20 < len(set(a[:100]) & set(TEXTS[400:])) < 50


def test_without_eod(inputs, tokenizer, tmp_path):
    preprocess(inputs, tmp_path / "d", tokenizer.path, append_eod=False)
    dataset = IndexedDataset(tmp_path / "d")
    assert tokenizer.decode(dataset.tokens(0, dataset.num_tokens)) == "".join(TEXTS)


BAD_LINES = [
    (b"{oops", r"not JSON \(.*\)"),
    (b'["text"]', "not a JSON object but list"),
    (b"7", "not a JSON object but int"),
    (b'{"body": "x"}', r"no key 'text' \(keys: 'body'\)"),
    (b"{}", r"no key 'text' \(keys: none\)"),
    (b'{"text": 5}', "the value of 'text' is not a string but int"),
    (b'{"text": null}', "the value of 'text' is not a string but NoneType"),
    (b'{"text": "\xff"}', "byte 10 of the line is not UTF-8"),
    (b'{"text": "a\\ud800"}', r"'text' is not valid Unicode: character 1 is the lone surrogate U\+D800"),
    (b"[" * 200000, "not JSON that can be read .*"),
    (b"\xef\xbb\xbf" + b'{"text": "x"}', "not JSON .*BOM .*"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("seed", [None, 1])
def test_bad_line_is_named(tmp_path, tokenizer, line, message, seed):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"in\.jsonl:3: {message}; .*mend the line or pass --on-bad-line skip"):
        preprocess([path], tmp_path / "d", tokenizer.path, seed=seed)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_line_numbers_in_later_spans(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("megagpt.data.work._SMALLEST_UNIT_BYTES", 50)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 40 + b"bad\n")
    with pytest.raises(DataError, match=r"in\.jsonl:41: not JSON"):
        preprocess([path], tmp_path / "d", tokenizer.path)


def test_bad_line_is_named_by_workers(tmp_path, tokenizer):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "good"}\nbad\n')
    with pytest.raises(DataError, match=r"in\.jsonl:2: not JSON"):
        preprocess([path], tmp_path / "d", tokenizer.path, workers=2)


def test_bad_lines_are_skipped_by_choice(tmp_path, tokenizer):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "one"}', *(line for line, _ in BAD_LINES), b'{"text": "two"}']))
    manifest = preprocess([path], tmp_path / "d", tokenizer.path, on_bad_line="skip")
    assert (manifest.skipped_bad, manifest.num_documents) == (len(BAD_LINES), 2)
    assert documents(tmp_path / "d", tokenizer) == ["one", "two"]


def test_empty_documents_are_counted(tmp_path, tokenizer):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n{"text": ""}\r\n\r\n{"text": "two"}\r\n')
    manifest = preprocess([path], tmp_path / "d", tokenizer.path)
    assert (manifest.skipped_short, manifest.skipped_bad) == (1, 0)
    assert documents(tmp_path / "d", tokenizer) == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
@pytest.mark.parametrize("seed", [None, 1])
def test_empty_corpus(tmp_path, tokenizer, content, seed):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"in\.jsonl: no document with text"):
        preprocess([path], tmp_path / "d", tokenizer.path, seed=seed)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_other_key(tmp_path, tokenizer):
    path = tmp_path / "in.jsonl"
    path.write_text('{"body": "hello"}\n')
    preprocess([path], tmp_path / "d", tokenizer.path, text_keys=["body"])
    assert documents(tmp_path / "d", tokenizer) == ["hello"]


def test_unusable_arguments(inputs, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"input .*none\.jsonl cannot be read \(No such file"):
        preprocess([tmp_path / "none.jsonl"], tmp_path / "d", tokenizer.path)
    with pytest.raises(DataError, match="no input file"):
        preprocess([], tmp_path / "d", tokenizer.path)
    with pytest.raises(DataError, match="workers=0"):
        preprocess(inputs, tmp_path / "d", tokenizer.path, workers=0)
    with pytest.raises(DataError, match=r"none\.model does not exist"):
        preprocess(inputs, tmp_path / "d", tmp_path / "none.model")
    with pytest.raises(DataError, match="cannot be written"):
        preprocess(inputs, inputs[0] / "d", tokenizer.path)


def test_a_failed_run_keeps_the_old_dataset(inputs, tokenizer, tmp_path):
    old = preprocess(inputs, tmp_path / "d", tokenizer.path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("bad\n")
    with pytest.raises(DataError):
        preprocess([bad], tmp_path / "d", tokenizer.path)
    assert verify_files(tmp_path / "d") == old


def test_bit_rot_is_found_by_the_hash(inputs, tokenizer, tmp_path):
    preprocess(inputs, tmp_path / "d", tokenizer.path)
    path = bin_path(tmp_path / "d")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    IndexedDataset(tmp_path / "d")  # cannot tell
    with pytest.raises(DataError, match=r"d\.bin has sha256 .* its manifest says"):
        verify_files(tmp_path / "d")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99}'])
def test_damaged_manifest(tmp_path, content):
    manifest_path(tmp_path / "d").write_text(content)
    with pytest.raises(DataError, match=r"d\.json is not a"):
        read_manifest(tmp_path / "d")


def test_no_manifest(tmp_path):
    assert read_manifest(tmp_path / "d") is None
    with pytest.raises(DataError, match=r"d\.json does not exist"):
        verify_files(tmp_path / "d")
