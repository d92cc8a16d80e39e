"""Duplicates: signatures of documents, pairs of equal signatures, groups of pairs; the first of each group stays.

Two documents are equal if they are but for white space, and alike if their MinHash signatures agree in one bucket.
Signatures and pairs are datatrove's: equality is a bucket of its own, whose signature is the hash of the text. In place
of datatrove's choice of the one that stays, which goes by the order of its files, the first one of the inputs stays;
thus it is the same one for both kinds.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature

from megagpt.cleaning import recipe
from megagpt.cleaning.words import WORDS, hash_text
from megagpt.data.files import write_whole

EXACT = MinhashConfig(num_buckets=1, hashes_per_bucket=2)
_LINES_PER_READ = 1024
_SHINGLES_AT_ONCE = 1024
REASONS = ("exact duplicate", "near duplicate")
DUPLICATE = np.dtype([("document", "<u4"), ("reason", "u1"), ("kept_task", "<u4"), ("kept_document", "<u4")])
"""A document of a task that goes, why (a number in `REASONS`), and the one that stays."""


def near_config(options: recipe.NearDuplicates) -> MinhashConfig:
    """datatrove's settings of MinHash."""
    return MinhashConfig(
        n_grams=options.n_grams,
        num_buckets=options.buckets,
        hashes_per_bucket=options.hashes_per_bucket,
        seed=options.seed,
    )


class ExactSignature(PipelineStep):
    """Writes hashes of texts in the form of datatrove's MinHash signatures, and passes documents on."""

    type, name = "megagpt", "exact signatures"

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Hash all documents of a task."""
        rows = []
        for number, document in enumerate(data):
            digest = hashlib.blake2b(" ".join(document.text.split()).encode(), digest_size=16).digest()
            # datatrove's hashes are below 2^61 - 1
            halves = (int.from_bytes(digest[at : at + 8], "little") >> 4 for at in (0, 8))
            rows.append((*halves, number))
            yield document
        rows.sort()
        table = np.array(rows, dtype=[("first", "<u8"), ("second", "<u8"), ("document", "<u4")])
        write_whole(self._folder / "bucket_000" / f"{rank:05d}.minhash.sig", table.tobytes())


class NearSignature(MinhashDedupSignature):
    """datatrove's MinHash signatures, in bounded memory: a long document's n-grams are hashed piece by piece."""

    def __init__(self, folder: Path, options: recipe.NearDuplicates):
        super().__init__(str(folder), near_config(options), language=WORDS)
        self._hash_func = hash_text

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Signature of hashed n-grams: the smallest of each hash.

        Args:
            shingles: (number, 1) of uint64.
        """
        pieces = range(0, len(shingles), _SHINGLES_AT_ONCE)
        parts = [super(NearSignature, self).get_signature(shingles[at : at + _SHINGLES_AT_ONCE]) for at in pieces]
        return parts[0] if len(parts) == 1 else np.min(np.array(parts, dtype=np.uint64), axis=0).tolist()


def pairs_step(signatures: Path, pairs: Path, config: MinhashConfig) -> PipelineStep:
    """datatrove's search for equal signatures; one task for each bucket."""
    return MinhashDedupBuckets(str(signatures), str(pairs), config=config, lines_to_buffer=_LINES_PER_READ)


class Clusters(PipelineStep):
    """From pairs of documents to those that go, in a file for each task that has some. Runs as one task.

    Args:
        exact: folder of the pairs of equal documents, None if they are not looked for.
        near: folder of the pairs of like documents.
        output: folder of the results.
    """

    type, name = "megagpt", "groups of duplicates"

    def __init__(self, exact: Path | None, near: Path | None, output: Path):
        super().__init__()
        self._exact, self._near, self._output = exact, near, output

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Find the groups."""
        assert world_size == 1, "a group may span all tasks"
        exact, near = _read_pairs(self._exact), _read_pairs(self._near)
        nodes, firsts = groups(np.concatenate([exact, near]))
        table = np.zeros(len(nodes), DUPLICATE)
        table["document"], table["kept_task"], table["kept_document"] = nodes & _LOW, firsts >> 32, firsts & _LOW
        table["reason"] = np.where(np.isin(nodes, groups(exact)[0]), 0, 1)
        tasks = nodes >> 32
        self._output.mkdir(parents=True, exist_ok=True)
        for task in np.unique(tasks):
            write_whole(duplicates_file(self._output, int(task)), table[tasks == task].tobytes())


_LOW = np.uint64(0xFFFFFFFF)


def _read_pairs(folder: Path | None) -> np.ndarray:
    """Pairs as (number, 2) of uint64: task << 32 | document."""
    found = [np.zeros((0, 4), "<u4")]
    if folder is not None:
        files = get_datafolder(str(folder)).list_files(glob_pattern="*.dups")
        found += [np.fromfile(folder / name, "<u4").reshape(-1, 4) for name in files]
    quads = np.concatenate(found).astype(np.uint64)
    return quads[:, 0::2] << np.uint64(32) | quads[:, 1::2]


def groups(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected nodes: all but the smallest of each group, in order, and the smallest ones of their groups.

    Args:
        pairs: (number, 2) of uint64.
    """
    nodes, ends = np.unique(pairs, return_inverse=True)
    first, second = ends.reshape(-1, 2).T
    label = np.arange(len(nodes))
    while True:
        one, other = label[first], label[second]
        apart = one != other
        if not apart.any():
            break
        np.minimum.at(label, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while (label[label] != label).any():
            label = label[label]
    goes = label != np.arange(len(nodes))
    return nodes[goes], nodes[label[goes]]


def duplicates_file(folder: Path, task: int) -> Path:
    """Where the duplicates of a task are listed."""
    return folder / f"{task:05d}.duplicates"


def read_duplicates(folder: Path, task: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Duplicates of a task in order: number, reason, and (task, number) of the one that stays."""
    path = duplicates_file(folder, task)
    table = np.fromfile(path, DUPLICATE) if path.exists() else np.zeros(0, DUPLICATE)
    for document, reason, kept_task, kept_document in table.tolist():
        yield document, reason, (kept_task, kept_document)
