"""Global batches do not depend on the layout; datasets, tokenizers and models that do not fit are refused."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from megagpt.data.indexed import IndexedWriter
from megagpt.data.loader import eval_batches, num_eval_batches, train_batches
from megagpt.data.manifest import manifest_path
from megagpt.data.preprocess import preprocess
from megagpt.data.run_data import open_data
from megagpt.data.samples import SampleStream
from megagpt.data.tokenizer import train_sentencepiece
from megagpt.errors import ConfigError, DataError
from megagpt.plan.data_config import DataConfig

SEQ_LENGTH = 4


class CountingTokens:
    """Token number i is i."""

    prefix = "counting"

    def tokens(self, start, stop):
        return np.arange(start, stop)


@pytest.fixture
def stream():
    return SampleStream(CountingTokens(), (0, 37 * SEQ_LENGTH + 1), SEQ_LENGTH, seed=5)


def first_tokens_of_steps(stream, num_steps, microbatch_size, data_parallel_size, first_sample=0, global_batch_size=12):
    """For each step the sorted first tokens of the samples of all ranks."""
    rounds = global_batch_size // (microbatch_size * data_parallel_size)
    steps = [[] for _ in range(num_steps)]
    for rank in range(data_parallel_size):
        batches = train_batches(
            stream,
            first_sample=first_sample,
            global_batch_size=global_batch_size,
            microbatch_size=microbatch_size,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
        )
        for step in steps:
            for tokens_BS, *_ in islice(batches, rounds):
                assert tokens_BS.shape == (microbatch_size, SEQ_LENGTH)
                step += tokens_BS[:, 0].tolist()
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("microbatch_size", "data_parallel_size"), [(12, 1), (1, 12), (2, 3), (3, 2), (4, 1), (1, 4)])
def test_global_batches_do_not_depend_on_the_layout(stream, microbatch_size, data_parallel_size):
    # Ten steps of 12 samples cross the end of three epochs of 37.
    expected = [sorted(int(stream.sample(step * 12 + i)[0]) for i in range(12)) for step in range(10)]
    assert first_tokens_of_steps(stream, 10, microbatch_size, data_parallel_size) == expected


@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_resuming_is_one_integer(stream, data_parallel_size):
    whole = first_tokens_of_steps(stream, 10, 2, data_parallel_size)
    assert first_tokens_of_steps(stream, 4, 3, 2, first_sample=6 * 12) == whole[6:]


def test_a_changed_global_batch_continues_without_gap(stream):
    [first] = first_tokens_of_steps(stream, 1, 2, 3)
    [second] = first_tokens_of_steps(stream, 1, 5, 1, first_sample=12, global_batch_size=25)
    # 12 + 25 samples are one epoch: each window once.
    assert sorted(first + second) == list(range(0, 37 * SEQ_LENGTH, SEQ_LENGTH))


def test_composition_of_a_micro_batch(stream):
    batches = train_batches(
        stream,
        first_sample=24,
        global_batch_size=12,
        microbatch_size=2,
        data_parallel_rank=1,
        data_parallel_size=3,
    )
    for micro_batch in range(4):
        tokens_BS, labels_BS, *_ = next(batches)
        windows = np.stack([stream.sample(24 + (micro_batch * 3 + 1) * 2 + i) for i in range(2)])
        assert tokens_BS.tolist() == windows[:, :-1].tolist()
        assert labels_BS.tolist() == windows[:, 1:].tolist()
        assert tokens_BS.dtype == labels_BS.dtype == torch.int64
        assert tokens_BS.is_contiguous()
        assert labels_BS.is_contiguous()


def test_batch_sizes_that_do_not_fit(stream):
    with pytest.raises(ConfigError, match=r"train_batch_size=10 .* use a multiple of 6"):
        train_batches(
            stream, first_sample=0, global_batch_size=10, microbatch_size=2, data_parallel_rank=0, data_parallel_size=3
        )


def evaluate(num_batches, num_samples=37):
    stream = SampleStream(CountingTokens(), (0, num_samples * SEQ_LENGTH + 1), SEQ_LENGTH, seed=5, shuffle=False)
    return [
        sample
        for rank in range(2)
        for tokens_BS, *_ in eval_batches(
            stream,
            num_batches=num_batches,
            global_batch_size=8,
            microbatch_size=2,
            data_parallel_rank=rank,
            data_parallel_size=2,
        )
        for sample in (tokens_BS[:, 0] // SEQ_LENGTH).tolist()
    ]


def test_evaluation_reads_each_sample_once():
    assert sorted(evaluate(2)) == list(range(16))
    assert sorted(evaluate(100)) == list(range(32))
    assert evaluate(2) == evaluate(2)


def test_evaluation_of_less_than_one_global_batch_repeats():
    assert sorted(evaluate(3, num_samples=5)) == [0, 0, 1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize(("num_batches", "expected"), [(1, 1), (4, 4), (5, 4)])
def test_number_of_evaluation_batches(stream, num_batches, expected):
    assert num_eval_batches(stream, num_batches, 8) == expected
    assert num_eval_batches(stream, num_batches, 38) == 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A dataset of 200 documents with its tokenizer: (prefix, tokenizer)."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"Document {i} tells of the number {i * i}." for i in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_sentencepiece(texts, folder / "t", 320)
    preprocess([folder / "text.jsonl"], folder / "d", tokenizer.path)
    return folder / "d", tokenizer


def config(prefix, tokenizer=None, split=(90.0, 5.0, 5.0)):
    return DataConfig(prefix=str(prefix), tokenizer=tokenizer and str(tokenizer.path), split=split)


def test_open_data(corpus):
    prefix, tokenizer = corpus
    streams = open_data(config(*corpus), 320, 16, seed=1)
    (validation,), (test,) = streams.validation, streams.test
    assert streams.mixture is None
    assert len(streams.train) > 10 * len(test.stream) > 0
    assert tokenizer.decode(validation.stream.sample(0)).startswith("Document 180 ")
    assert tokenizer.decode(test.stream.sample(0)).startswith("Document 190 ")
    assert (validation.name, validation.share) == ("", 1.0)
    assert [streams.train.sample(i)[0] for i in range(9)] != [
        open_data(config(prefix), 320, 16, seed=2).train.sample(i)[0] for i in range(9)
    ]


def test_short_splits_are_none(corpus):
    streams = open_data(config(*corpus, split=(99.0, 1.0, 0.0)), 320, 1000, seed=1)
    assert (streams.validation, streams.test) == ((), ())


def test_prefix_is_needed():
    with pytest.raises(ConfigError, match=r"data\.prefix is not set"):
        open_data(DataConfig(), 320, 16, seed=1)


def test_model_with_another_vocabulary(corpus):
    _, tokenizer = corpus
    with pytest.raises(DataError, match=rf"vocab_size=5000 but tokenizer {tokenizer.path} has 320 tokens; set .*=320"):
        open_data(config(*corpus), 5000, 16, seed=1)


def test_model_with_a_smaller_vocabulary_than_the_dataset(corpus):
    prefix, _ = corpus
    with pytest.raises(DataError, match=r"model\.vocab_size=300 but dataset .* set model\.vocab_size=320"):
        open_data(config(prefix), 300, 16, seed=1)


def test_another_tokenizer_than_the_datasets(corpus, tmp_path):
    prefix, tokenizer = corpus
    other = train_sentencepiece(["some other text about 320 things " * 9, "Document"] * 9, tmp_path / "other", 290)
    with pytest.raises(DataError, match=r"data\.tokenizer=.*other\.model .* is not the tokenizer of data\.prefix") as e:
        open_data(config(prefix, other), 320, 16, seed=1)
    assert tokenizer.sha256[:12] in str(e.value)
    assert other.sha256[:12] in str(e.value)


def test_missing_tokenizer(corpus, tmp_path):
    prefix, _ = corpus
    with pytest.raises(DataError, match=r"none\.model does not exist"):
        open_data(DataConfig(prefix=str(prefix), tokenizer=str(tmp_path / "none.model")), 320, 16, seed=1)


def test_manifest_of_another_dataset(corpus, tmp_path):
    prefix, _ = corpus
    with IndexedWriter(tmp_path / "d", 320) as writer:
        writer.add(range(100))
    manifest_path(tmp_path / "d").write_bytes(manifest_path(prefix).read_bytes())
    with pytest.raises(DataError, match=r"describes 200 documents .* hold 1 with 100"):
        open_data(config(tmp_path / "d"), 320, 16, seed=1)


def test_without_manifest_each_sample_is_checked(tmp_path):
    with IndexedWriter(tmp_path / "d", 320) as writer:
        writer.add(range(100))
    stream = open_data(config(tmp_path / "d", split=(1.0, 0.0, 0.0)), 50, 99, seed=1).train
    with pytest.raises(DataError, match=r"token number 50 is 50, outside model\.vocab_size=50"):
        stream.sample(0)
