"""Corruptions that Megatron's reader turns into wrong text, one by one: found on opening, or by the checksums."""

import shutil
import struct

import numpy as np
import pytest

from megagpt.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path
from megagpt.data.inspection import inspect_dataset
from megagpt.data.manifest import manifest_path, read_manifest
from megagpt.data.preprocess import preprocess
from megagpt.data.run_data import damaged_datasets, open_data
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import DataError
from megagpt.plan.data_config import DataConfig

HEADER, TYPE_AT, COUNT_AT, DOCUMENTS_AT = 34, 17, 18, 26
VOCABULARY, NUM_DOCUMENTS = 300, 60


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Folder with a dataset `d` of the tool, and one `other` of as many documents and tokens."""
    import json

    folder = tmp_path_factory.mktemp("intact")
    texts = [f"Document {i:03} is about {'numbers ' * (i % 7)}." for i in range(NUM_DOCUMENTS)]
    tokenizer = train_sentencepiece(texts, folder / "t", VOCABULARY)
    for name, chosen in (("d", texts), ("other", texts[::-1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        preprocess([folder / f"{name}.jsonl"], folder / name, tokenizer.path)
    return folder


def patch(path, at, content):
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at : at + len(content)] = content
    path.write_bytes(data)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def length_at(row):
    return HEADER + 4 * row


def pointer_at(row):
    return HEADER + 4 * NUM_DOCUMENTS + 8 * row


def document_at(row):
    return HEADER + 12 * NUM_DOCUMENTS + 8 * row


def change_lengths(idx, first, second):
    """Move tokens from one document to the next without a trace in the sum."""
    lengths = np.frombuffer(idx.read_bytes(), "<i4", NUM_DOCUMENTS, HEADER)
    patch(idx, length_at(first), struct.pack("<i", lengths[first] - 1))
    patch(idx, length_at(second), struct.pack("<i", lengths[second] + 1))


def shift_border(idx):
    """The same, with the pointers made to fit: the index is whole, its borders are wrong."""
    change_lengths(idx, 4, 5)
    (start,) = struct.unpack_from("<q", idx.read_bytes(), pointer_at(5))
    patch(idx, pointer_at(5), struct.pack("<q", start - 2))


def write_foreign(prefix, vocab_size, tokens):
    with IndexedWriter(prefix, vocab_size) as writer:
        for _ in range(NUM_DOCUMENTS):
            writer.add(tokens)


def copy_foreign(folder, suffix):
    write_foreign(folder / "x", VOCABULARY, [1, 2])
    shutil.copy(folder / f"x.{suffix}", folder / f"d.{suffix}")


def damage_manifest(folder, key, value):
    import json

    content = json.loads(manifest_path(folder / "d").read_text())
    content[key] = value
    manifest_path(folder / "d").write_text(json.dumps(content))


ON_OPENING = {
    "bin cut within a token": lambda f: cut(f / "d.bin", -1),
    "bin cut between tokens": lambda f: cut(f / "d.bin", -2),
    "bin cut to half": lambda f: cut(f / "d.bin", (f / "d.bin").stat().st_size // 2),
    "bin empty": lambda f: cut(f / "d.bin", 0),
    "bin with bytes behind": lambda f: (f / "d.bin").write_bytes((f / "d.bin").read_bytes() + b"\0\0"),
    "bin missing": lambda f: (f / "d.bin").unlink(),
    "bin of another dataset": lambda f: copy_foreign(f, "bin"),
    "idx cut in the header": lambda f: cut(f / "d.idx", 20),
    "idx cut in the lengths": lambda f: cut(f / "d.idx", length_at(7) + 1),
    "idx cut in the documents": lambda f: cut(f / "d.idx", -8),
    "idx missing": lambda f: (f / "d.idx").unlink(),
    "idx and bin swapped": lambda f: [shutil.copy(f / "d.bin", f / "x"), shutil.copy(f / "d.idx", f / "d.bin"),
                                      shutil.copy(f / "x", f / "d.idx")],
    "idx of another dataset": lambda f: copy_foreign(f, "idx"),
    "wrong magic": lambda f: patch(f / "d.idx", 0, b"TNTIDX\0\0"),
    "wrong version": lambda f: patch(f / "d.idx", 9, struct.pack("<Q", 2)),
    "token type of another size": lambda f: patch(f / "d.idx", TYPE_AT, b"\4"),
    "unknown token type": lambda f: patch(f / "d.idx", TYPE_AT, b"\x17"),
    "number of sequences off by one": lambda f: patch(f / "d.idx", COUNT_AT, struct.pack("<Q", NUM_DOCUMENTS - 1)),
    "number of documents off by one": lambda f: patch(f / "d.idx", DOCUMENTS_AT, struct.pack("<Q", NUM_DOCUMENTS)),
    "manifest of another dataset": lambda f: damage_manifest(f, "num_tokens", 5),
    "manifest cut": lambda f: cut(f / "d.json", 100),
}  # fmt: skip
IN_ROWS = {
    "lengths changed": lambda f: change_lengths(f / "d.idx", 4, 5),
    "a length below zero": lambda f: patch(f / "d.idx", length_at(3), struct.pack("<i", -4)),
    "pointers off by one token": lambda f: patch(f / "d.idx", pointer_at(9), struct.pack("<q", 1)),
    "a pointer beyond the end": lambda f: patch(f / "d.idx", pointer_at(9), struct.pack("<q", 1 << 40)),
    "document indices out of order": lambda f: patch(f / "d.idx", document_at(5), struct.pack("<q", 50)),
}
BY_CHECKSUM = {
    "bit rot in the tokens": lambda f: patch(f / "d.bin", 100, bytes([(f / "d.bin").read_bytes()[100] ^ 1])),
    "a border shifted without a trace": lambda f: shift_border(f / "d.idx"),
    "stale idx of as many documents": lambda f: shutil.copy(f / "other.idx", f / "d.idx"),
    "bin of the same size": lambda f: shutil.copy(f / "other.bin", f / "d.bin"),
    "a signed token type": lambda f: patch(f / "d.idx", TYPE_AT, b"\3"),
}


@pytest.fixture
def folder(intact, tmp_path):
    for path in intact.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def config(folder, **more):
    return DataConfig(prefix=str(folder / "d"), split=(1.0, 0.0, 0.0), **more)


def test_what_is_intact_passes(folder):
    assert len(ON_OPENING) + len(IN_ROWS) + len(BY_CHECKSUM) >= 24
    open_data(config(folder), VOCABULARY, 16, seed=1)
    assert damaged_datasets(config(folder, verify_checksums=True)) == []
    assert inspect_dataset(folder / "d", verify=True).checks[2:] == (
        "checksums of .bin and .idx are those of the manifest",
        "all tokens are within the vocabulary of 300",
    )


@pytest.mark.parametrize("corruption", ON_OPENING)
def test_found_on_opening(folder, corruption):
    ON_OPENING[corruption](folder)
    for open_it in (lambda: open_data(config(folder), VOCABULARY, 16, seed=1), lambda: inspect_dataset(folder / "d")):
        with pytest.raises(DataError, match=r"d\.(idx|bin|json)"):
            open_it()


@pytest.mark.parametrize("corruption", IN_ROWS)
def test_rows_that_contradict_each_other(folder, corruption):
    intact = open_data(config(folder), VOCABULARY, 16, seed=1).train
    IN_ROWS[corruption](folder)
    with pytest.raises(DataError, match=r"d\.idx: "):
        inspect_dataset(folder / "d")
    # A run does not read them, so its tokens are right; only the rows at which splits are cut are looked at.
    train = open_data(config(folder), VOCABULARY, 16, seed=1).train
    assert len(train) == len(intact)
    assert all((train.sample(i) == intact.sample(i)).all() for i in range(len(train)))
    for document in range(1, NUM_DOCUMENTS - 1):
        split = (float(document), float(NUM_DOCUMENTS - document), 0.0)
        cut = DataConfig(prefix=str(folder / "d"), split=split)
        try:
            found = open_data(cut, VOCABULARY, 1, seed=1)
        except DataError as error:
            assert "d.idx: " in str(error)  # noqa: PT017
            continue
        lengths = [len(stream) for stream in (found.train, *(part.stream for part in found.validation))]
        assert sum(lengths) == IndexedDataset(folder / "d", check_rows=False).num_tokens - 2, "cut at a right place"
    manifest_path(folder / "d").unlink()
    with pytest.raises(DataError, match=r"d\.idx: "):  # without a manifest all rows are checked
        open_data(config(folder), VOCABULARY, 16, seed=1)


@pytest.mark.parametrize("corruption", BY_CHECKSUM)
def test_found_by_the_checksums(folder, corruption):
    before = [path(folder / "d").read_bytes() for path in (bin_path, idx_path)]
    BY_CHECKSUM[corruption](folder)
    assert [path(folder / "d").read_bytes() for path in (bin_path, idx_path)] != before
    IndexedDataset(folder / "d")  # nothing in the format tells
    with pytest.raises(DataError, match="has sha256"):
        inspect_dataset(folder / "d", verify=True)
    assert damaged_datasets(config(folder)) == [], "only if asked for"
    shared = [damaged_datasets(config(folder, verify_checksums=True), part, 2) for part in range(2)]
    assert [len(problems) for problems in shared] == [1, 0], "the other one looks at what there is beside it"
    ((problem, exit_code),) = damaged_datasets(config(folder, verify_checksums=True))
    assert "the file was damaged or replaced" in problem
    assert exit_code == 2


def test_tokens_outside_the_vocabulary_without_a_manifest(folder):
    write_foreign(folder / "d", 5000, [1, 2, 4999])
    manifest_path(folder / "d").unlink()
    assert read_manifest(folder / "d") is None
    with pytest.raises(DataError, match=r"token number 2 is 4999, outside the vocabulary of 300"):
        inspect_dataset(folder / "d", verify=True, vocab_size=VOCABULARY)
    stream = open_data(config(folder), VOCABULARY, 16, seed=1).train
    with pytest.raises(DataError, match=r"is 4999, outside model\.vocab_size=300"):
        stream.sample(0)
    ((problem, _),) = damaged_datasets(config(folder, verify_checksums=True))
    assert "d.json does not exist" in problem
