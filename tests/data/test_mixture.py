"""Mixtures of the run config: amounts, temperature, stages, separate files, and what is refused."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megagpt.data.indexed import IndexedWriter
from megagpt.data.loader import train_batches
from megagpt.data.mixture import make_mixture
from megagpt.data.run_data import open_data
from megagpt.errors import ConfigError, DataError
from megagpt.plan import run_config_from_dict
from megagpt.plan.data_config import DataConfig

LENGTH = 4
MODEL = dict(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100, max_position_embeddings=LENGTH)


def config(**data):
    return DataConfig(**data)


def datasets(**entries):
    return [dict(prefix=name, name=name, **given) for name, given in entries.items()]


def shares_of(data, sizes):
    return [float(share) for share in make_mixture(data, sizes, LENGTH).steps[0].shares]


def test_weights_are_read_as_they_are_written():
    mixture = make_mixture(config(datasets=datasets(a=dict(weight=0.1), b=dict(weight=0.2))), [5, 5], LENGTH)
    assert mixture.steps[0].shares == (Fraction(1, 3), Fraction(2, 3))


def test_amounts_and_temperature():
    assert shares_of(config(datasets=datasets(a={}, b={})), [30, 10]) == [0.75, 0.25]
    assert shares_of(config(datasets=datasets(a={}, b={}), temperature=2.0), [900, 100]) == pytest.approx([0.75, 0.25])
    epochs = config(datasets=datasets(a=dict(epochs=1.0), b=dict(epochs=3.0)))
    assert shares_of(epochs, [30, 10]) == [0.5, 0.5]
    mixed = config(datasets=datasets(a=dict(epochs=0.5), b=dict(tokens=5 * LENGTH)))
    assert shares_of(mixed, [30, 10]) == [0.75, 0.25]
    with pytest.raises(ConfigError, match=r"data\.datasets: b would have a share of 1\.0e-08, less than 1e-06"):
        shares_of(config(datasets=datasets(a={}, b={})), [10**9, 10])


def test_epochs_are_met_exactly():
    data = config(datasets=datasets(a=dict(epochs=2.0), b=dict(epochs=1.0), c=dict(epochs=5.0)))
    assert make_mixture(data, [7, 31, 3], LENGTH).counts(14 + 31 + 15) == [14, 31, 15]


STAGED = dict(
    datasets=datasets(a=dict(weight=3.0), b=dict(weight=1.0), c=dict(weight=0.0)),
    stages=[
        dict(from_tokens=10 * LENGTH, weights=dict(a=1.0, b=1.0)),
        dict(from_tokens=17 * LENGTH + 1, weights=dict(c=1.0)),
    ],
)


def test_stages_begin_where_they_should_and_go_on_in_each_dataset():
    mixture = make_mixture(config(**STAGED), [100, 100, 100], LENGTH)
    origins = [mixture.origin(i) for i in range(30)]
    assert [origin.stage for origin in origins] == [0] * 10 + [1] * 8 + [2] * 12
    seen = Counter()
    for index, origin in enumerate(origins):
        assert mixture.counts(index) == [seen[0], seen[1], seen[2]]
        assert origin.number == seen[origin.dataset]
        seen[origin.dataset] += 1
    assert [seen[d] for d in range(3)] == [8 + 4, 2 + 4, 12]


def test_a_stage_added_later_changes_nothing_before_it():
    earlier = make_mixture(config(**STAGED | {"stages": STAGED["stages"][:1]}), [100] * 3, LENGTH)
    later = make_mixture(config(**STAGED), [100] * 3, LENGTH)
    assert [earlier.origin(i) for i in range(18)] == [later.origin(i) for i in range(18)]
    assert earlier.origin(18).dataset != later.origin(18).dataset or earlier.origin(19) != later.origin(19)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """Three datasets of 20 documents; tokens tell dataset (tens) and nothing else, lengths are 3 to 7."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, name in enumerate("abc"):
        with IndexedWriter(folder / name, 100) as writer:
            for i in range(20):
                writer.add(np.full(3 + i % 5, 10 * number + i % 10))
    return folder


def entries(folder, **given):
    return [dict(prefix=str(folder / name), **more) for name, more in given.items()]


def test_a_mixture_is_read(prefixes):
    data = config(datasets=entries(prefixes, a=dict(weight=3.0), b=dict(weight=1.0)), split=(80.0, 10.0, 10.0))
    run = open_data(data, 100, LENGTH, seed=3)
    assert run.mixture.names == ("a", "b")
    assert Counter(int(run.train.sample(i)[0]) // 10 for i in range(400)) == {0: 300, 1: 100}
    first_epoch = [run.train.sample(i) for i in range(100)]
    of_b = [s.tolist() for s in first_epoch if s[0] >= 10]
    single = open_data(config(prefix=str(prefixes / "b"), split=(80.0, 10.0, 10.0)), 100, LENGTH, seed=3)
    assert of_b == [single.train.sample(i).tolist() for i in range(len(of_b))], "each dataset as by itself"
    assert [(part.name, part.share) for part in run.validation] == [("a", 0.75), ("b", 0.25)]
    assert len(run.train) == sum(len(stream) for stream in run.train.streams)


def test_batches_of_a_mixture_do_not_depend_on_the_layout_and_resume(prefixes):
    data = config(datasets=entries(prefixes, a={}, b={}, c={}), temperature=3.0, split=(1.0, 0.0, 0.0))
    stream = open_data(data, 100, LENGTH, seed=3).train

    def steps(size, first_sample, num_steps):
        ranks = [
            train_batches(stream, first_sample=first_sample, global_batch_size=8, microbatch_size=2,
                          data_parallel_rank=rank, data_parallel_size=size)
            for rank in range(size)
        ]  # fmt: skip
        return [
            sorted(row.tolist() for rank in ranks for _ in range(4 // size) for row in next(rank)[0])
            for _ in range(num_steps)
        ]

    whole = steps(1, 0, 20)
    assert steps(4, 0, 20) == whole
    assert steps(2, 8 * 13, 7) == whole[13:]


def test_separate_files_for_held_out_text(prefixes):
    data = config(prefix=str(prefixes / "a"), validation=entries(prefixes, b={}), test=entries(prefixes, c={}))
    run = open_data(data, 100, LENGTH, seed=3)
    assert {int(run.train.sample(i).max()) // 10 for i in range(len(run.train))} == {0}
    assert len(run.train) == (20 * 5 - 1) // LENGTH, "all documents are trained on"
    (validation,), (test,) = run.validation, run.test
    assert (validation.name, test.name) == ("", "")
    assert int(validation.stream.sample(0)[0]) == 10
    assert int(test.stream.sample(0)[0]) == 20
    two = config(prefix=str(prefixes / "a"), validation=entries(prefixes, b={}, c={}))
    parts = open_data(two, 100, LENGTH, seed=3).validation
    assert [(part.name, part.share) for part in parts] == [("b", 0.5), ("c", 0.5)]
    assert open_data(two, 100, LENGTH, seed=3).test == ()


def test_a_copy_of_the_training_text_is_not_held_out(prefixes, tmp_path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"copy.{suffix}").symlink_to(prefixes / f"a.{suffix}")
    data = config(prefix=str(prefixes / "a"), validation=[dict(prefix=str(tmp_path / "copy"))])
    with pytest.raises(DataError, match=r"data\.validation: .*copy holds the same tokens as .*a of data\.datasets"):
        open_data(data, 100, LENGTH, seed=3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (dict(prefix="x", datasets=datasets(a={})), "data.prefix=x and data.datasets are both set"),
        (dict(datasets=[dict(prefix="u/a"), dict(prefix="v/a")]), "name 'a' is the name of several datasets"),
        (dict(datasets=[dict(prefix="u/a", name="a/b")]), "name 'a/b' must be a text without /"),
        (
            dict(datasets=[dict(prefix="a"), dict(prefix="a", name="b")]),
            "data.datasets: prefix=a appears 2 times; list it once",
        ),
        (dict(datasets=datasets(a=dict(weight=1.0, epochs=2.0))), "a has weight and epochs; give one of them"),
        (dict(datasets=datasets(a=dict(weight=1.0), b={})), "a has weight, b has nothing; give all a weight"),
        (dict(datasets=datasets(a=dict(weight=0.0))), "data.datasets: all weights are 0"),
        (
            dict(datasets=datasets(a=dict(weight=1.0), b=dict(weight=1e-7))),
            "data.datasets: b has weight=1e-07, a share of 1.0e-07, less than 1e-06; raise it",
        ),
        (dict(datasets=datasets(a=dict(weight=1.0)), temperature=2.0), "data.temperature=2 is for shares that follow"),
        (dict(prefix="a", temperature=2.0), "data.temperature=2 mixes several datasets, but data.datasets is empty"),
        (dict(prefix="a", stages=[dict(from_tokens=9, weights={})]), "data.stages changes a mixture, but"),
        (
            dict(datasets=datasets(a={}), stages=[dict(from_tokens=9, weights=dict(b=1.0))]),
            "data.stages from_tokens=9: b is in no data.datasets; they are a",
        ),
        (
            dict(datasets=datasets(a={}), stages=[dict(from_tokens=n, weights=dict(a=1.0)) for n in (9, 11)]),
            "data.stages: from_tokens=11 follows 9; list stages in order, at least one sample",
        ),
        (dict(prefix="a", validation=datasets(a={})), "data.validation: prefix=a is used twice, but no document may"),
        (dict(prefix="a", validation=datasets(b={}), test=datasets(b={})), "data.test: prefix=b is used twice"),
        (dict(prefix="a", validation=datasets(b={}), split=[8, 1, 1]), "but data.validation names datasets for that"),
        (dict(datasets=[dict(prefix="a", wieght=1.0)]), "data.datasets.0.wieght: unknown key; did you mean weight?"),
        (dict(datasets=[dict(name="a")]), "data.datasets.0.prefix is missing; write it"),
        (dict(datasets="a"), "data.datasets='a' must be a list"),
        (dict(datasets=datasets(a=dict(weight=-1.0))), "data.datasets.0.weight=-1.0 must be at least 0"),
    ],
)
def test_what_is_refused_before_anything_is_opened(data, words):
    from megagpt.plan import deepspeed_config_from_dict, make_plan

    def plan():
        run = run_config_from_dict({"model": MODEL, "training": {"steps": 10}, "data": data})
        make_plan(run, deepspeed_config_from_dict({"train_batch_size": 8}), 1)

    with pytest.raises(ConfigError) as caught:
        plan()
    assert any(words in problem for problem in caught.value.problems), caught.value.problems
