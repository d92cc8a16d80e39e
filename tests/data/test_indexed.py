"""The .bin/.idx files are Megatron's, byte for byte, and damage is found on opening."""

import hashlib
import struct

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megagpt.data.indexed import IndexedDataset, IndexedWriter, bin_path, dtype_for_vocabulary, idx_path
from megagpt.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 99]]
HEADER_BYTES = 34


def write(prefix, documents=DOCUMENTS, vocab_size=100):
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return writer


def build_with_megatron(prefix, documents, dtype):
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for sequences in documents:
        lengths = [len(sequence) for sequence in sequences]
        builder.add_document(np.concatenate(sequences).astype(dtype), lengths)
    builder.finalize(str(idx_path(prefix)))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32), (200000, np.int32)])
def test_bytes_equal_megatrons(tmp_path, vocab_size, dtype):
    documents = [np.random.default_rng(i).integers(0, vocab_size, i * 7 % 50).tolist() for i in range(200)]
    write(tmp_path / "ours", documents, vocab_size)
    build_with_megatron(tmp_path / "theirs", [[document] for document in documents], dtype)
    assert dtype_for_vocabulary(vocab_size) == dtype
    assert bin_path(tmp_path / "ours").read_bytes() == bin_path(tmp_path / "theirs").read_bytes()
    assert idx_path(tmp_path / "ours").read_bytes() == idx_path(tmp_path / "theirs").read_bytes()


def test_megatron_reads_ours(tmp_path):
    write(tmp_path / "d")
    dataset = MegatronDataset(str(tmp_path / "d"), mmap=True)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_we_read_megatrons_documents_of_several_sequences(tmp_path):
    build_with_megatron(tmp_path / "d", [[[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9, 10]]], np.int32)
    dataset = IndexedDataset(tmp_path / "d")
    assert [dataset.document(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    assert dataset.document_offsets.tolist() == [0, 3, 6, 10]


def test_reading_back(tmp_path):
    writer = write(tmp_path / "deep" / "folder" / "d")
    dataset = IndexedDataset(tmp_path / "deep" / "folder" / "d")
    assert (dataset.num_documents, dataset.num_tokens) == (4, 9) == (writer.num_documents, writer.num_tokens)
    assert [dataset.document(i).tolist() for i in range(4)] == DOCUMENTS
    assert dataset.document_offsets.tolist() == [0, 3, 4, 4, 9]
    assert dataset.tokens(2, 6).tolist() == [7, 8, 9, 10]
    assert dataset.tokens(9, 9).tolist() == []
    for path, found in ((bin_path, writer.bin_sha256), (idx_path, writer.idx_sha256)):
        assert hashlib.sha256(path(dataset.prefix).read_bytes()).hexdigest() == found


def test_documents_across_chunks_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.indexed._ROWS_PER_CHUNK", 3)
    for count in (2, 3, 4, 6, 7):
        documents = [[i] * (i % 4) for i in range(count)]
        write(tmp_path / f"d{count}", documents)
        build_with_megatron(tmp_path / f"m{count}", [[document] for document in documents], np.uint16)
        assert idx_path(tmp_path / f"d{count}").read_bytes() == idx_path(tmp_path / f"m{count}").read_bytes()
        dataset = IndexedDataset(tmp_path / f"d{count}")
        assert [dataset.document(i).tolist() for i in range(count)] == documents


def test_no_documents(tmp_path):
    write(tmp_path / "d", [])
    dataset = IndexedDataset(tmp_path / "d")
    assert (dataset.num_documents, dataset.num_tokens, dataset.document_offsets.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10)])
def test_ranges_outside_are_refused(tmp_path, start, stop):
    write(tmp_path / "d")
    with pytest.raises(IndexError, match="outside the 9 tokens"):
        IndexedDataset(tmp_path / "d").tokens(start, stop)


@pytest.mark.parametrize("index", [-1, 4])
def test_documents_outside_are_refused(tmp_path, index):
    write(tmp_path / "d")
    with pytest.raises(IndexError, match="outside 0 to 3"):
        IndexedDataset(tmp_path / "d").document(index)


def documents_then_error():
    yield [1, 2, 3]
    raise RuntimeError("stop")


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "d", documents_then_error())
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_old_files(tmp_path):
    write(tmp_path / "d")
    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "d", documents_then_error())
    assert IndexedDataset(tmp_path / "d").num_tokens == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_a_failing_disk_leaves_no_half_dataset(tmp_path, monkeypatch):
    write(tmp_path / "d")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "_write_index", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "d", [[1]])
    assert IndexedDataset(tmp_path / "d").num_tokens == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_rewriting_replaces(tmp_path):
    write(tmp_path / "d")
    write(tmp_path / "d", [[1, 2]])
    assert IndexedDataset(tmp_path / "d").document(0).tolist() == [1, 2]


@pytest.mark.parametrize("token", [-1, 100, 70000])
def test_tokens_outside_the_vocabulary_are_refused(tmp_path, token):
    with pytest.raises(DataError, match=f"token {token} is outside the vocabulary of 100"):
        write(tmp_path / "d", [[1, token]])
    assert list(tmp_path.iterdir()) == []


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"d\.bin does not exist; data\.prefix is the path without"):
        IndexedDataset(tmp_path / "d")
    bin_path(tmp_path / "d").touch()
    with pytest.raises(DataError, match=r"d\.idx does not exist"):
        IndexedDataset(tmp_path / "d")


def at_length(row):
    return HEADER_BYTES + 4 * row


def at_pointer(row):
    return HEADER_BYTES + 4 * 4 + 8 * row


def at_document(row):
    return HEADER_BYTES + 12 * 4 + 8 * row


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", "does not start with"),
        (9, struct.pack("<Q", 2), "version 2, only 1 is known"),
        (17, b"\x04", r"expected \d+ from the lengths"),  # i32 instead of u16
        (17, b"\x02", r"expected \d+ from the lengths"),  # i8
        (17, b"\x03", None),  # i16: same width; found by the vocabulary check only
        (17, b"\x07", "token type code 7"),
        (17, b"\x00", "token type code 0"),
        (18, struct.pack("<Q", 3), r"has 122 bytes, expected 110 for 3 sequences and 4 documents"),
        (18, struct.pack("<Q", 2**62), "expected"),
        (26, struct.pack("<Q", 6), "has 122 bytes, expected 130"),
        (26, struct.pack("<Q", 0), "expected"),
        (at_length(0), struct.pack("<i", 2), "sequence 1 starts at byte 6, expected 4"),
        (at_length(3), struct.pack("<i", 4), r"d\.bin has 18 bytes, expected 16"),
        (at_length(2), struct.pack("<i", -1), "sequence 2 has a length of -1"),
        (at_pointer(1), struct.pack("<q", 7), "sequence 1 starts at byte 7, expected 6"),
        (at_document(0), struct.pack("<q", 1), "document indices run from 1 to 4"),
        (at_document(4), struct.pack("<q", 3), "document indices run from 0 to 3"),
        (at_document(2), struct.pack("<q", 0), "document 1 ends before it starts"),
    ],
)
def test_damaged_index(tmp_path, offset, content, message):
    write(tmp_path / "d")
    path = idx_path(tmp_path / "d")
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)
    if message is None:
        assert IndexedDataset(tmp_path / "d").dtype == np.int16
        return
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(tmp_path / "d")
    assert "rebuild both files with tools/preprocess_data.py" in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 20, 33, 34, 60, 121])
def test_truncated_index(tmp_path, size):
    write(tmp_path / "d")
    path = idx_path(tmp_path / "d")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"d\.idx (does not start|is truncated|has \d+ bytes, expected 122)"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("change", [-2, -1, 2])
def test_bin_of_the_wrong_size(tmp_path, change):
    write(tmp_path / "d")
    path = bin_path(tmp_path / "d")
    path.write_bytes((path.read_bytes() + b"xx")[: 18 + change])
    with pytest.raises(DataError, match=rf"d\.bin has {18 + change} bytes, expected 18 from d\.idx"):
        IndexedDataset(tmp_path / "d")


def test_multimodal_modes_are_tolerated(tmp_path):
    write(tmp_path / "d")
    path = idx_path(tmp_path / "d")
    path.write_bytes(path.read_bytes() + bytes(4))
    assert IndexedDataset(tmp_path / "d").document(3).tolist() == DOCUMENTS[3]
