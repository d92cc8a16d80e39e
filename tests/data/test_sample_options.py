"""Sample options of a run config on real datasets: chats of which the answers are learnt, one document per sample."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megagpt.data.inspection import BORDER, LEARNT, READ
from megagpt.data.manifest import manifest_path
from megagpt.data.marking import PADDING
from megagpt.data.preprocess import preprocess
from megagpt.data.run_data import open_data
from megagpt.data.tokenizer import CHAT_TOKENS, train_sentencepiece
from megagpt.errors import DataError
from megagpt.plan.data_config import DataConfig

ROOT = Path(__file__).parents[2]
VOCABULARY = 340
CHATS = [
    [(f"what is {i} and {'again ' * (i % 7)}{i}?", f"it is {2 * i}{', truly' * (i % 5)}."), ("thanks", f"no. {i}")]
    for i in range(60)
]


def chat_text(turns):
    """ChatML."""
    return "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for question, answer in turns
    )


def answers(turns):
    """What is to be learnt of a chat: answers, and that they end."""
    return "".join(f"{answer}<|im_end|>" for _, answer in turns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats")
    lines = [json.dumps({"text": chat_text(turns)}) + "\n" for turns in CHATS]
    (path / "chats.jsonl").write_text("".join(lines))
    texts = [line for turns in CHATS for pair in turns for line in pair]
    train_sentencepiece([*texts, "user\n", "assistant\n"], path / "t", VOCABULARY, special_tokens=CHAT_TOKENS)
    preprocess([path / "chats.jsonl"], path / "chats", path / "t.model", special_tokens_in_text=True)
    preprocess([path / "chats.jsonl"], path / "plain", path / "t.model")
    preprocess([path / "chats.jsonl"], path / "no_end", path / "t.model", append_eod=False)
    return path


def config(folder, prefix="chats", **options):
    return DataConfig(prefix=str(folder / prefix), tokenizer=str(folder / "t.model"), split=(1.0, 0.0, 0.0), **options)


SPANS = {"start": "<|im_start|>assistant\n", "end": "<|im_end|>"}


def spelt(tokens, tokenizer):
    """Text with chat tokens; the end of a document as a bar."""
    names = {token: text for text, token in tokenizer.special_tokens.items()} | {tokenizer.eod_id: "|"}
    return "".join(names.get(int(token)) or tokenizer.decode([token]) for token in tokens)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from megagpt.tokenization.tokenizer import Tokenizer

    return Tokenizer.load(folder / "t.model")


def test_chat_tokens_mean_themselves_only_if_asked_for(folder, tokenizer):
    from megagpt.data.indexed import IndexedDataset

    start, end = (tokenizer.special_tokens[text] for text in CHAT_TOKENS)
    marked = IndexedDataset(folder / "chats").document(5).tolist()
    assert (marked.count(start), marked.count(end)) == (4, 4)
    assert spelt(marked, tokenizer) == chat_text(CHATS[5]) + "|"
    plain = IndexedDataset(folder / "plain").document(5).tolist()
    assert start not in plain
    assert tokenizer.decode(plain) == chat_text(CHATS[5]), "plain text, spelt with ordinary tokens"
    kept = json.loads(manifest_path(folder / "chats").read_text())
    assert kept["special_tokens_in_text"] is True
    with pytest.raises(DataError, match=r"was made differently .*special_tokens_in_text: True before, False now"):
        preprocess([folder / "chats.jsonl"], folder / "chats", folder / "t.model")


def test_long_texts_with_chat_tokens(folder, tokenizer, monkeypatch):
    """A text that is cut into pieces gives the same tokens."""
    from megagpt.data import encode, long_texts
    from megagpt.data.indexed import IndexedDataset

    text = "".join(map(chat_text, CHATS))
    (folder / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    preprocess([folder / "long.jsonl"], folder / "whole", folder / "t.model", special_tokens_in_text=True)
    monkeypatch.setattr(long_texts, "LONG_CHARACTERS", 500)
    monkeypatch.setattr(long_texts, "_WINDOW", 100)
    monkeypatch.setattr(encode, "LONG_CHARACTERS", 500)
    preprocess([folder / "long.jsonl"], folder / "cut", folder / "t.model", special_tokens_in_text=True)
    whole, cut = (IndexedDataset(folder / name).document(0).tolist() for name in ("whole", "cut"))
    assert cut == whole
    assert spelt(whole, tokenizer) == text + "|"


@pytest.mark.parametrize("packing", ["stream", "cut"])
def test_answers_are_learnt(folder, tokenizer, packing):
    data = open_data(config(folder, loss_spans=SPANS, packing=packing), VOCABULARY, 16, seed=3)
    stream = data.train
    samples = [stream.marked(i) for i in range(len(stream))]
    learnt = sorted(spelt(sample.tokens[1:][sample.learnt[1:]], tokenizer) for sample in samples)
    total = sum(map(len, learnt))
    wanted = sum(len(answers(turns)) for turns in CHATS)
    assert wanted - 16 * 5 <= total <= wanted, "all answers, but for the last partial sample of a stream"
    assert packing == "stream" or total == wanted
    assert not any("?" in text or "thanks" in text for text in learnt), "no question"


def test_truncated_chats(folder, tokenizer):
    stream = open_data(config(folder, loss_spans=SPANS, packing="truncate"), VOCABULARY, 400, seed=3).train
    assert len(stream) == 60
    found = sorted(spelt(s.tokens[1:][s.learnt[1:]], tokenizer) for s in map(stream.marked, range(60)))
    assert found == sorted(map(answers, CHATS))


def test_validation_is_marked_like_training(folder):
    data = config(folder, loss_spans=SPANS, packing="cut").model_copy(update={"split": (80.0, 10.0, 10.0)})
    run = open_data(data, VOCABULARY, 32, seed=3)
    for held_out in (*run.validation, *run.test):
        learnt = [held_out.stream.marked(i).learnt.mean() for i in range(len(held_out.stream))]
        assert 0 < np.mean(learnt) < 0.8
    described = run.described()
    assert [len(part.stream) for part in described.validation] == [len(part.stream) for part in run.validation]


@pytest.mark.parametrize(
    ("prefix", "options", "words"),
    [
        (
            "chats",
            {"loss_spans": {"start": "<|bot|>"}},
            r"<\|bot\|> is no special token of .*t.model \(it has .*<\|im_end\|>",
        ),
        (
            "plain",
            {"loss_spans": SPANS},
            "plain: data.loss_spans finds nothing to learn in .* samples: .*--special-tokens",
        ),
        (
            "no_end",
            {"reset_attention_mask": True},
            "no_end: documents do not end .* data.reset_attention_mask would know",
        ),
        ("no_end", {"loss_spans": SPANS}, "no_end: documents do not end with the end-of-document token"),
    ],
)
def test_datasets_that_do_not_fit_the_options(folder, prefix, options, words):
    with pytest.raises(DataError, match=words):
        open_data(config(folder, prefix, **options), VOCABULARY, 16, seed=3)


def test_documents_without_an_end_can_have_samples_of_their_own(folder):
    stream = open_data(config(folder, "no_end", packing="truncate"), VOCABULARY, 400, seed=3).train
    assert len(stream) == 60


def inspect(folder, **options):
    run = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": VOCABULARY,
                  "max_position_embeddings": 96},
        "data": {"prefix": str(folder / "chats"), "tokenizer": str(folder / "t.model"), "split": [1, 0, 0], **options},
        "training": {"steps": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, str(ROOT / "tools" / "inspect_data.py"), "--config", "run.yaml", "--samples", "2"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_inspection_shows_what_is_learnt_and_where_documents_end(folder):
    text = inspect(folder, loss_spans=SPANS, reset_attention_mask=True)
    assert "data.reset_attention_mask: True" in text
    assert "of 96 predictions are learnt" in text
    assert BORDER in text
    assert f"<|im_start|>assistant\n {LEARNT} it is" in text
    assert f"<|im_end|> {READ} \n<|im_start|>user" in text
    padded = inspect(folder, packing="truncate")
    assert "tokens of padding" in padded
    assert BORDER not in padded


def test_a_mixture_of_documents(folder):
    entries = [{"prefix": str(folder / "chats"), "weight": 1.0}, {"prefix": str(folder / "plain"), "weight": 2.0}]
    data = DataConfig(datasets=entries, tokenizer=str(folder / "t.model"), packing="cut", split=(1.0, 0.0, 0.0))
    stream = open_data(data, VOCABULARY, 64, seed=3).train
    samples = [stream.marked(i) for i in range(12)]
    assert all((sample.places != PADDING).sum() >= 2 for sample in samples)
    assert all(sample.tokens.tolist() == stream.sample(i).tolist() for i, sample in enumerate(samples))
