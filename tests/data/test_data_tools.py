"""The three commands from installed text to a dataset, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import verify_files

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name, *arguments):
    return subprocess.run(
        [sys.executable, TOOLS / name, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i} is about {i * i}."}) + "\n" for i in range(300)))
    return path


def test_from_text_to_dataset(corpus, tmp_path):
    trained = run_tool("train_tokenizer.py", "--input", corpus, "--output-prefix", tmp_path / "t", "--vocab-size", 300)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout.startswith(f"{tmp_path}/t.model: 300 tokens")
    options = ["--input", corpus, "--output-prefix", tmp_path / "d", "--tokenizer", tmp_path / "t.model"]
    made = run_tool("preprocess_data.py", *options, "--append-eod", "--workers", 2, "--seed", 3)
    assert (made.returncode, made.stderr) == (0, "")
    assert "300 documents" in made.stdout
    manifest = verify_files(tmp_path / "d")
    assert (manifest.num_documents, manifest.seed, manifest.append_eod) == (300, 3, True)
    dataset = IndexedDataset(tmp_path / "d")
    assert all(dataset.document(i)[-1] == 2 for i in range(300))


def test_errors_are_one_line_and_status_2(corpus, tmp_path):
    failed = run_tool("train_tokenizer.py", "--input", corpus, "--output-prefix", tmp_path / "t", "--vocab-size", 9999)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: vocab_size=9999 is too large for 300 documents")
    assert failed.stderr.count("\n") == 1
    options = ["--input", tmp_path / "no.jsonl", "--output-prefix", tmp_path / "d", "--tokenizer", tmp_path / "t.model"]
    failed = run_tool("preprocess_data.py", *options)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: tokenizer")


def test_collect_docs_explains_itself():
    shown = run_tool("collect_docs.py", "--help")
    assert shown.returncode == 0
    assert {"--output", "--max-mb", "--seed"} <= set(shown.stdout.split())
