"""Datasets in an object store, a real S3 server: the very samples of the local files, errors that say what to do."""

from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed import IndexedDataset, IndexedWriter
from megagpt.data.inspection import inspect_dataset
from megagpt.data.run_data import open_data
from megagpt.errors import DataError, MegagptError, StorageError
from megagpt.plan import load_deepspeed_config, make_plan, run_config_from_dict
from megagpt.plan.data_config import DataConfig
from megagpt.storage import location
from megagpt.storage.cache import Cache


@pytest.fixture
def remote(dataset, bucket) -> str:
    """URL of a copy of the tiny dataset."""
    for suffix in (".bin", ".idx", ".json"):
        location(f"{bucket}/sets/data{suffix}").write_bytes(Path(f"{dataset['prefix']}{suffix}").read_bytes())
    return f"{bucket}/sets/data"


def config(dataset: dict, prefix: str, folder: Path, **more) -> DataConfig:
    return DataConfig(**{**dataset, "prefix": prefix, "cache_directory": str(folder), **more})


@pytest.mark.parametrize("cache_gb", [20.0, 1e-6])
def test_samples_are_those_of_the_local_files(dataset, remote, tmp_path, cache_gb):
    here = open_data(config(dataset, dataset["prefix"], tmp_path), 300, 32, seed=5)
    there = open_data(config(dataset, remote, tmp_path, cache_gb=cache_gb), 300, 32, seed=5)
    assert len(here.train) == len(there.train) > 100
    for index in range(0, 2 * len(here.train), 17):
        assert np.array_equal(here.train.sample(index), there.train.sample(index))
    (ours,), (theirs,) = here.validation, there.validation
    assert np.array_equal(ours.stream.sample(1), theirs.stream.sample(1))


def test_the_tool_looks_into_it(dataset, remote, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    found, expected = inspect_dataset(remote, verify=True), inspect_dataset(dataset["prefix"], verify=True)
    assert (found.num_documents, found.num_tokens) == (expected.num_documents, expected.num_tokens)
    assert found.checks == expected.checks


def test_what_is_missing_or_damaged_is_told(dataset, remote, tmp_path):
    with pytest.raises(DataError, match=r"s3://.*/other.bin does not exist; data.prefix is the path without"):
        open_data(config(dataset, f"{remote}/other", tmp_path), 300, 32, seed=5)
    with pytest.raises(StorageError, match=r"s3://nowhere/data.json: there is no such bucket"):
        open_data(config(dataset, "s3://nowhere/data", tmp_path), 300, 32, seed=5)
    index = bytearray(location(f"{remote}.idx").read_bytes())
    index[-20] ^= 1
    location(f"{remote}.idx").write_bytes(bytes(index))
    with pytest.raises(MegagptError, match=r"data.idx has sha256 .*, .* was expected; the file was damaged"):
        open_data(config(dataset, remote, tmp_path), 300, 32, seed=5)


def test_a_token_file_that_goes_away_is_an_error_of_the_data(dataset, remote, tmp_path):
    opened = IndexedDataset(remote, cache=Cache(tmp_path))
    location(f"{remote}.bin").unlink()
    with pytest.raises(DataError, match=r"data\.bin"):
        opened.tokens(0, 10)


def test_datasets_are_written_to_local_folders(tmp_path):
    with pytest.raises(DataError, match="datasets are written to local folders"):
        IndexedWriter("s3://bucket/data", 300)


def test_urls_are_judged_by_the_plan():
    tree = {
        "model": {"preset": "quickstart"},
        "data": {"prefix": "s4://bucket/data", "cache_directory": "s3://bucket/cache"},
        "training": {"steps": 1},
    }
    with pytest.raises(MegagptError) as failure:
        make_plan(run_config_from_dict(tree), load_deepspeed_config("ds_configs/quickstart.json"), 1)
    assert "data.prefix: s4://bucket/data: fsspec knows no s4://" in str(failure.value)
    assert "data.cache_directory=s3://bucket/cache is in an object store" in str(failure.value)
