"""What tools/inspect_data.py shows, as text and as a page."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed import IndexedDataset, IndexedWriter
from megagpt.data.inspection import (
    BORDER,
    decoded_documents,
    decoded_sample,
    inspect_dataset,
    measure_lengths,
    mixture_table,
    wanted_samples,
)
from megagpt.data.mixture import make_mixture
from megagpt.data.samples import SampleStream
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.plan.data_config import DataConfig

ROOT = Path(__file__).parents[2]
TEXTS = [f"<b>Document</b> {i} & its {'many ' * (i % 9)}words." for i in range(30)]


def test_lengths_are_counted_in_ranges_that_double():
    found = measure_lengths(np.array([0, 1, 2, 3, 3, 4, 9]))
    assert (found.smallest, found.median, found.largest, found.num_empty) == (0, 3, 9, 1)
    assert found.bounds == (0, 1, 2, 4, 8)
    assert found.documents == (1, 1, 3, 1, 1)
    assert found.tokens == (0, 1, 8, 4, 9)
    assert measure_lengths(np.array([], dtype=np.int64)).documents == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two datasets without manifest, `a` and `b`, their tokenizer, and a run config that mixes them."""
    folder = tmp_path_factory.mktemp("inspected")
    tokenizer = train_sentencepiece(TEXTS, folder / "t", 300)
    for name in "ab":
        with IndexedWriter(folder / name, 300) as writer:
            for text in TEXTS:
                writer.add([*tokenizer.encode(text), tokenizer.eod_id])
    (folder / "run.yaml").write_text(
        "model: {preset: quickstart, vocab_size: 300}\ntraining: {steps: 10, seq_length: 64}\n"
        "data: {tokenizer: t.model, datasets: [{prefix: a, weight: 3}, {prefix: b, weight: 1}]}\n"
    )
    return folder, tokenizer


def test_documents_and_samples_as_text(folder):
    path, tokenizer = folder
    lines = list(decoded_documents(path / "a", tokenizer, 3, characters=20))
    assert [line.split(" (")[0] for line in lines[::2]] == ["document 0", "document 10", "document 20"]
    assert lines[1].startswith(TEXTS[0][:20] + "... (")
    dataset = IndexedDataset(path / "a")
    stream = SampleStream(dataset, (0, dataset.num_tokens), 64, seed=1, shuffle=False)
    offsets = dataset.document_offsets
    told, text = decoded_sample(dataset, stream, 3, tokenizer, characters=10**6)
    borders = int(((offsets > 192) & (offsets < 257)).sum())
    assert borders > 0
    first = int(np.searchsorted(offsets, 192, side="right")) - 1
    assert told == f"sample 3: tokens 192 to 256, from document {first} on, {borders} borders"
    assert text.count(BORDER) == borders
    assert text.split(f" {BORDER} ")[1] == TEXTS[first + 1] or borders == 1


def test_mixture_table():
    data = DataConfig(
        datasets=[dict(prefix="web", weight=0.75), dict(prefix="code", weight=0.25)],
        stages=[dict(from_tokens=32 * 4, weights=dict(code=1.0))],
    )
    mixture = make_mixture(data, [9, 9], 4)
    lines = mixture_table(mixture, 1, 2, 16)
    assert [line.split() for line in lines] == [
        ["step", "web", "code"],
        ["2", "12", "4"],
        ["3", "0", "16"],
        ["read", "24", "24"],
        ["wanted", "24.0", "24.0"],
    ]
    assert wanted_samples(mixture, 16) == [12, 4]


def test_a_dataset_without_manifest_says_so(folder):
    found = inspect_dataset(folder[0] / "a", verify=True)
    assert "no checksums to compare" in found.checks[-1]


class Texts(HTMLParser):
    """Texts of all <pre> elements, and the names of all elements."""

    def __init__(self):
        super().__init__()
        self.texts, self.tags, self._inside = [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = tag == "pre"
        if self._inside:
            self.texts.append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data


def inspect(path, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "inspect_data.py"), *arguments]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_a_page_of_what_it_prints(folder):
    path, _ = folder
    arguments = ["--config", "run.yaml", "--documents", "2", "--samples", "1", "--steps", "3", "--html", "page.html"]
    result = inspect(path, *arguments, "--global-batch-size", "8", "--verify")
    assert (result.returncode, result.stderr) == (0, "")
    page = Texts()
    page.feed((path / "page.html").read_text())
    assert page.tags.count("svg") == 3, "lengths of two datasets, and the mixture"
    assert "b" not in page.tags, "the documents' own markup is text"
    for text in page.texts:
        assert text in result.stdout
    assert sum("<b>Document</b> 0" in text for text in page.texts) == 2


def test_all_damaged_datasets_are_told(folder):
    result = inspect(folder[0], "nowhere", "a", "missing")
    assert result.returncode == 2
    assert result.stdout.startswith("a: 30 documents")
    assert [line.split()[1] for line in result.stderr.splitlines()] == ["nowhere.bin", "missing.bin"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--samples", "1"], "samples and mixtures belong to a run; give its --config"),
        ([], "give either prefixes or --config"),
        (["a", "--documents", "1"], "texts need a tokenizer; give its path with --tokenizer"),
    ],
)
def test_arguments_that_do_not_go_together(folder, arguments, words):
    result = inspect(folder[0], *arguments)
    assert result.returncode == 2
    assert words in result.stderr
