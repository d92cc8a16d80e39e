"""Fill-in-the-middle: documents come back when they are put together again, and nothing depends on anything but the
sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.fill_in_middle import MiddleFiller
from megagpt.data.indexed import IndexedWriter
from megagpt.data.inspection import decoded_sample
from megagpt.data.order import uniform_numbers
from megagpt.data.run_data import open_data
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import ConfigError, DataError
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.plan.data_config import DataConfig

EOD, PREFIX, MIDDLE, SUFFIX = 0, 1, 2, 3
GOLDEN = [0.178533, 0.934321, 0.464161]


def filler(rate=1.0, spm_rate=0.5, seed=1):
    return MiddleFiller(rate, spm_rate, PREFIX, MIDDLE, SUFFIX, EOD, seed)


def put_together(document):
    """The document that was rearranged; as it is if it was not."""
    if PREFIX not in document:
        return document
    middle = document.index(MIDDLE)
    suffix = document.index(SUFFIX)
    assert document[0] == PREFIX
    if suffix == 1:  # suffix, prefix, middle
        return document[middle + 1 :] + document[2:middle]
    return document[1:suffix] + document[middle + 1 :] + document[suffix + 1 : middle]


def documents_of(tokens):
    found = [[]]
    for token in tokens.tolist():
        if token == EOD:
            found.append([])
        else:
            found[-1].append(token)
    return found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(10, 99), max_size=12), min_size=1, max_size=6),
    st.floats(0, 1),
    st.integers(0, 2**62),
)
def test_documents_come_back(documents, spm_rate, number):
    text = [token for document in documents for token in [*document, EOD]]
    room = np.array(text + [EOD] * 3 * len(documents))  # empty documents at the end make place, so that nothing is lost
    changed = filler(spm_rate=spm_rate)(room, number)
    assert len(changed) == len(room)
    found = documents_of(changed)
    assert [put_together(document) for document in found[: len(documents)]] == documents
    assert all((PREFIX in after) == (len(before) >= 3) for before, after in zip(documents, found, strict=False))


def test_rates_are_met_and_cuts_are_anywhere():
    tokens = np.arange(10, 20)
    changed = [filler(rate=0.4, spm_rate=0.25)(tokens, i).tolist() for i in range(4000)]
    rearranged = [sample for sample in changed if sample[0] == PREFIX]
    assert len(rearranged) / 4000 == pytest.approx(0.4, abs=0.03)
    suffix_first = sum(sample[1] == SUFFIX and len(sample) > 2 for sample in rearranged)
    # An empty prefix looks the same: two of eleven cuts at the very front, a share of 1 - (10 / 11) ** 2.
    assert suffix_first / len(rearranged) == pytest.approx(0.25 + 0.75 * (1 - (10 / 11) ** 2), abs=0.04)
    assert {sample.index(SUFFIX) for sample in rearranged if SUFFIX in sample} >= set(range(1, 9))
    assert all(len(sample) == 10 for sample in changed), "three tokens at the end make place"


def test_nothing_but_the_sample_and_the_seed_matter():
    tokens = np.arange(10, 60)
    assert filler()(tokens, 7).tolist() == filler()(tokens.copy(), 7).tolist()
    assert filler()(tokens, 7).tolist() != filler()(tokens, 8).tolist()
    assert filler()(tokens, 7).tolist() != filler(seed=2)(tokens, 7).tolist()
    assert tokens.tolist() == list(range(10, 60)), "the sample itself is left alone"


def test_random_numbers_are_uniform_and_stay_as_they_are():
    numbers = np.concatenate([uniform_numbers(1, i, 10) for i in range(2000)])
    assert 0 <= numbers.min() < numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(2000, abs=200)
    assert uniform_numbers(1234, 0, 3) == pytest.approx(GOLDEN, abs=1e-6)  # part of every run that was ever started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fim")
    texts = [f"Document {i} has a number of words, {'many ' * (i % 5)}of them." for i in range(60)]
    special = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    tokenizer = train_sentencepiece(texts, folder / "t", 310, special_tokens=special)
    train_sentencepiece(texts, folder / "bare", 310)
    with IndexedWriter(folder / "d", 310) as writer:
        for text in texts:
            writer.add([*tokenizer.encode(text), tokenizer.eod_id])
    return folder, tokenizer


def test_only_training_samples_of_a_run_are_rearranged(folder):
    path, tokenizer = folder
    data = dict(prefix=str(path / "d"), tokenizer=str(tokenizer.path))
    plain, run = (
        open_data(DataConfig(**data, **more), 310, 64, seed=1) for more in ({}, {"fill_in_middle": {"rate": 1.0}})
    )
    begins = tokenizer.special_tokens["<|fim_prefix|>"]
    assert all(begins in run.train.sample(i) and begins not in plain.train.sample(i) for i in range(20))
    assert all(len(run.train.sample(i)) == 65 for i in range(20))
    assert run.validation[0].stream.sample(0).tolist() == plain.validation[0].stream.sample(0).tolist()
    _, text = decoded_sample(run.train.dataset, run.train, 0, tokenizer, 10**6)
    assert "<|fim_prefix|>" in text
    assert "<|fim_middle|>" in text


def test_a_tokenizer_without_the_special_tokens(folder):
    path, _ = folder
    data = DataConfig(prefix=str(path / "d"), tokenizer=str(path / "bare.model"), fill_in_middle={"rate": 0.5})
    with pytest.raises(DataError, match=r"data\.fill_in_middle\.prefix_token=<\|fim_prefix\|> is no special token of"):
        open_data(data, 310, 64, seed=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"fill_in_middle": {"rate": 0.5}},
            "data.fill_in_middle needs the ids of its special tokens; set data.tokenizer",
        ),
        ({"tokenizer": "t", "fill_in_middle": {"rate": 0.5, "prefix_token": "<|fim_middle|>"}}, "name three different"),
        ({"fill_in_middle": {"rate": 0.0}}, "data.fill_in_middle.rate=0.0 must be greater than 0"),
        ({"fill_in_middle": {}}, "data.fill_in_middle.rate is missing"),
    ],
)
def test_wrong_configs(data, words):
    model = dict(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100, max_position_embeddings=8)

    def plan():
        run = run_config_from_dict({"model": model, "training": {"steps": 10}, "data": data})
        make_plan(run, deepspeed_config_from_dict({"train_batch_size": 8}), 1)

    with pytest.raises(ConfigError) as caught:
        plan()
    assert any(words in problem for problem in caught.value.problems), caught.value.problems
