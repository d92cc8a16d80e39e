"""Any damage to .idx, .bin or the manifest is either found or leaves the tokens as they were."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path
from megagpt.data.manifest import manifest_path, read_manifest, verify_files
from megagpt.data.preprocess import preprocess
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 99], [1] * 20]
MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADER_BYTES, TYPE_AT = 34, 17


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Prefix, and the intact .idx and .bin."""
    prefix = tmp_path_factory.mktemp("damage") / "d"
    with IndexedWriter(prefix, 100) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    return prefix, idx_path(prefix).read_bytes(), bin_path(prefix).read_bytes()


def read_all(prefix):
    found = IndexedDataset(prefix)
    return [found.document(i).tolist() for i in range(found.num_documents)], found.dtype


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)


@MANY
@given(CHANGES, st.integers(-30, 30))
def test_overwritten_cut_or_extended_idx(dataset, changes, size_change):
    prefix, idx, content = dataset
    damaged = bytearray(idx)
    for at, piece in changes:
        at %= len(damaged)
        damaged[at : at + len(piece)] = piece[: len(damaged) - at]
    damaged = damaged[:size_change] if size_change < 0 else damaged + b"\1" * size_change
    idx_path(prefix).write_bytes(damaged)
    bin_path(prefix).write_bytes(content)
    try:
        documents, dtype = read_all(prefix)
    except DataError:
        return
    # Only what cannot change a token is left: the modes behind the index, and the sign of two bytes (found by the
    # vocabulary); documents may be told apart differently where the borders still follow each other.
    assert [token for document in documents for token in document] == [t for d in DOCUMENTS for t in d]
    assert dtype.itemsize == 2


@MANY
@given(st.binary(max_size=200))
def test_any_bytes_as_idx(dataset, content):
    prefix, idx, tokens = dataset
    bin_path(prefix).write_bytes(tokens)
    for start in (b"", idx[:9], idx[:HEADER_BYTES]):
        idx_path(prefix).write_bytes(start + content)
        try:
            read_all(prefix)
        except DataError as error:
            assert "d.idx" in str(error) or "d.bin" in str(error)  # noqa: PT017
        else:
            assert (start + content)[: len(idx)] == idx or len(tokens) == 0


@MANY
@given(st.integers(0, 100))
def test_bin_of_another_size(dataset, size):
    prefix, idx, tokens = dataset
    idx_path(prefix).write_bytes(idx)
    bin_path(prefix).write_bytes((tokens * 3)[:size])
    if size == len(tokens):
        assert read_all(prefix)[0] == DOCUMENTS
    else:
        with pytest.raises(DataError, match=r"d\.bin has \d+ bytes, expected 58"):
            read_all(prefix)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Prefix and manifest of a dataset of the tool."""
    folder = tmp_path_factory.mktemp("made")
    texts = [f"Document {i} is about {i * i}." for i in range(100)]
    tokenizer = train_sentencepiece(texts, folder / "t", 300)
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([folder / "in.jsonl"], folder / "d", tokenizer.path)
    return folder / "d", manifest_path(folder / "d").read_bytes()


@MANY
@given(CHANGES, st.integers(-300, 0))
def test_damaged_manifest(made, changes, cut):
    prefix, content = made
    damaged = bytearray(content)
    for at, piece in changes:
        at %= len(damaged)
        damaged[at : at + len(piece)] = piece[: len(damaged) - at]
    manifest_path(prefix).write_bytes(damaged[: cut or None])
    try:
        found = read_manifest(prefix)
    except DataError as error:
        assert "d.json" in str(error)  # noqa: PT017
    else:
        assert found is not None
        assert isinstance(found.num_tokens, int)
        assert isinstance(found.tokenizer_sha256, str)


ENTRIES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.none(), max_size=2)


@MANY
@given(st.data())
def test_entries_of_wrong_types(made, data):
    prefix, content = made
    manifest = json.loads(content)
    key = data.draw(st.sampled_from(sorted(manifest)))
    old, manifest[key] = manifest[key], data.draw(ENTRIES)
    manifest_path(prefix).write_text(json.dumps(manifest))
    try:
        found = read_manifest(prefix)
    except DataError:
        return
    allowed = (int, type(None)) if key == "seed" else (type(old), tuple)
    assert type(getattr(found, key)) in allowed


@MANY
@given(st.integers(0, 10_000), st.integers(0, 7), st.booleans())
def test_each_flipped_bit_is_found_by_the_hash(made, at, bit, in_idx):
    prefix, manifest = made
    manifest_path(prefix).write_bytes(manifest)
    path = (idx_path if in_idx else bin_path)(prefix)
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[at % len(damaged)] ^= 1 << bit
    try:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="has sha256"):
            verify_files(prefix)
    finally:
        path.write_bytes(intact)


def test_a_stale_idx_of_as_many_documents(dataset):
    prefix, idx, tokens = dataset
    with IndexedWriter(prefix, 100) as writer:
        for document in DOCUMENTS[::-1]:
            writer.add(np.array(document))
    bin_path(prefix).write_bytes(tokens)
    documents, _ = read_all(prefix)
    # The same sizes: nothing in the format tells; the manifest's hashes do.
    assert documents != DOCUMENTS
    idx_path(prefix).write_bytes(idx)
