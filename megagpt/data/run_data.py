"""From a data config to the streams of samples of a run, without torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.data.document_samples import DocumentStream
from megagpt.data.fill_in_middle import make_middle_filler
from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import Manifest, read_manifest, verify_files
from megagpt.data.marking import MarkedSample
from megagpt.data.mixture import MixedStream, Mixture, Samples, make_mixture
from megagpt.data.opening import dataset_file
from megagpt.data.sample_options import marking_of, require_document_ends, require_learnt
from megagpt.data.samples import SampleStream, split_documents, split_ranges
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError, DataError
from megagpt.plan.data_config import DataConfig, NamedPrefix
from megagpt.storage import RemotePath
from megagpt.storage.cache import Cache


@dataclass(frozen=True)
class HeldOut:
    """Text that is not trained on."""

    name: str
    """Of the dataset; empty if there is just one."""
    stream: Samples
    """Its samples, in file order."""
    share: float
    """Weight of its loss in the mean over datasets; those of one split add up to 1."""


@dataclass(frozen=True)
class Elsewhere:
    """Samples that another rank reads: how many there are is all that is known here."""

    num_samples: int
    seq_length: int
    """Tokens of a sample that are predicted."""

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, global_index: int) -> np.ndarray:
        """There is none here."""
        raise AssertionError(f"sample {global_index} is for another rank to read")

    def marked(self, global_index: int) -> MarkedSample:
        """There is none here."""
        raise AssertionError(f"sample {global_index} is for another rank to read")


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    train: Samples
    """Endless and shuffled."""
    validation: tuple[HeldOut, ...]
    """Empty if there is no text for it."""
    test: tuple[HeldOut, ...]
    """Empty if there is no text for it."""

    @property
    def mixture(self) -> Mixture | None:
        """Which dataset gives which training sample; None if there is just one."""
        return self.train.mixture if isinstance(self.train, MixedStream) else None

    def described(self) -> "RunData":
        """The same without what is read, for ranks that receive samples."""

        def parts(held_out: tuple[HeldOut, ...]) -> tuple[HeldOut, ...]:
            return tuple(HeldOut(part.name, _elsewhere(part.stream), part.share) for part in held_out)

        return RunData(_elsewhere(self.train), parts(self.validation), parts(self.test))


def _elsewhere(stream: Samples) -> Elsewhere:
    return Elsewhere(len(stream), stream.seq_length)


def open_data(config: DataConfig, vocab_size: int, seq_length: int, seed: int) -> RunData:
    """Open the datasets of a run and check that datasets, tokenizer and model belong together.

    Args:
        config: the run's `data` section; `prefix` or `datasets` are needed.
        vocab_size: model.vocab_size.
        seq_length: tokens per sample that are predicted.
        seed: gives the order of the training samples.

    Raises:
        ConfigError: there is no dataset, or data.split is no split.
        DataError: a file is missing or damaged, files contradict each other or the model, a document is in two splits,
            or the text is too short.
    """
    if not config.mixed:
        raise ConfigError(
            "data.prefix is not set; give the path that tools/preprocess_data.py wrote, without .bin/.idx"
        )
    opened = _Opened(config, vocab_size, seq_length, seed)
    if config.has_held_out_files:
        streams = [opened.stream(entry.prefix, "train", (1.0, 0.0, 0.0)) for entry in config.mixed]
        held_out = {
            split: [(entry.label, opened.stream(entry.prefix, "train", (1.0, 0.0, 0.0), False)) for entry in entries]
            for split, entries in (("validation", config.validation), ("test", config.test))
        }
        opened.require_separate_splits()
    else:
        streams = [opened.stream(entry.prefix, "train", config.split) for entry in config.mixed]
        held_out = {
            split: [(entry.label, opened.stream(entry.prefix, split, config.split)) for entry in config.mixed]
            for split in ("validation", "test")
        }
    trained = [stream for stream in streams if stream is not None]
    assert len(trained) == len(streams), "training text that is too short raises an error"
    train: Samples = trained[0]
    shares = {}
    if config.datasets:
        mixture = make_mixture(config, [len(stream) for stream in trained], seq_length)
        train = MixedStream(mixture, trained)
        shares = {name: float(share) for name, share in zip(mixture.names, mixture.steps[-1].shares, strict=True)}
    return RunData(train, _held_out(held_out["validation"], shares), _held_out(held_out["test"], shares))


def open_whole(
    entries: Sequence[NamedPrefix], config: DataConfig, vocab_size: int, seq_length: int
) -> tuple[HeldOut, ...]:
    """Open datasets that no run need know of, all their documents in file order, each weighed alike.

    Args:
        entries: the datasets.
        config: names the tokenizer that they must have been made with.
        vocab_size: model.vocab_size.
        seq_length: tokens per sample that are predicted.

    Raises:
        DataError: a file is missing or damaged, made with another tokenizer, or shorter than one sample.
    """
    opened = _Opened(config.model_copy(update={"fill_in_middle": None}), vocab_size, seq_length, seed=0)
    streams = [(entry.label, opened.stream(entry.prefix, "train", (1.0, 0.0, 0.0), shuffle=False)) for entry in entries]
    for (_, stream), entry in zip(streams, entries, strict=True):
        if stream is None:
            raise DataError(
                f"{entry.prefix} is shorter than one sample of {seq_length} tokens; give more text, or a smaller "
                "training.seq_length"
            )
    return tuple(HeldOut(name, stream, 1 / len(streams)) for name, stream in streams if stream is not None)


def damaged_datasets(config: DataConfig, part: int = 0, of: int = 1) -> list[tuple[str, int]]:
    """Compare all files of a run with the checksums of their manifests, if `verify_checksums` asks for it.

    Args:
        config: names them.
        part: look at every `of`-th dataset from this one on, so that ranks can share the work.
        of: number of parts.

    Returns:
        What is wrong, one sentence per dataset, and the exit status that goes with it; a dataset without manifest
        counts as wrong.
    """
    problems: list[tuple[str, int]] = []
    if config.verify_checksums:
        for entry in (*config.mixed, *config.validation, *config.test)[part::of]:
            try:
                verify_files(entry.prefix)
            except DataError as error:
                problems.append((str(error), error.exit_code))
    return problems


def _held_out(streams: Sequence[tuple[str, Samples | None]], shares: dict[str, float]) -> tuple[HeldOut, ...]:
    """Those that are long enough, weighed as in training if all of them are trained on, else equally."""
    found = [(name, stream) for name, stream in streams if stream is not None]
    weights = [shares.get(name, 0.0) for name, _ in found]
    if not set(shares) >= {name for name, _ in found} or sum(weights) == 0:
        weights = [1.0] * len(found)
    if len(streams) == 1:
        found = [("", stream) for _, stream in found]
    return tuple(
        HeldOut(name, stream, weight / sum(weights)) for (name, stream), weight in zip(found, weights, strict=True)
    )


class _Opened:
    """The datasets of a run, each opened and checked once."""

    def __init__(self, config: DataConfig, vocab_size: int, seq_length: int, seed: int):
        self._config, self._vocab_size, self._seq_length, self._seed = config, vocab_size, seq_length, seed
        self._tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
        self._change = None
        if config.fill_in_middle is not None:
            assert self._tokenizer is not None, "a rule of the config"
            self._change = make_middle_filler(config.fill_in_middle, self._tokenizer, seed)
        self._marking = marking_of(config, self._tokenizer)
        self._datasets: dict[str, tuple[IndexedDataset, Manifest | None]] = {}

    def stream(
        self, prefix: str, split: str, shares: tuple[float, float, float], shuffle: bool = True
    ) -> Samples | None:
        """One split of a dataset: shuffled for training, else in file order; None if it is too short for a sample and
        not for training."""
        trains = split == "train" and shuffle
        if self._config.packing == "stream":
            stream = self._across_documents(prefix, split, shares, trains)
        else:
            stream = self._by_documents(prefix, split, shares, trains)
        if stream is not None and trains:
            require_learnt(self._config, prefix, stream)
        return stream

    def _across_documents(
        self, prefix: str, split: str, shares: tuple[float, float, float], trains: bool
    ) -> Samples | None:
        dataset, _ = self._open(prefix)
        start, stop = split_ranges(dataset.num_documents, dataset.document_start, shares)[split]
        if not trains and stop - start <= self._seq_length:
            return None
        return SampleStream(
            dataset,
            (start, stop),
            self._seq_length,
            self._seed,
            shuffle=trains,
            vocab_size=self._vocab_size,
            change=self._change if trains else None,
            marking=self._marking,
        )

    def _by_documents(
        self, prefix: str, split: str, shares: tuple[float, float, float], trains: bool
    ) -> Samples | None:
        dataset, _ = self._open(prefix)
        first, behind = split_documents(dataset.num_documents, shares)[split]
        if not trains and dataset.document_start(behind) - dataset.document_start(first) < 2:
            return None
        return DocumentStream(
            dataset,
            (first, behind),
            self._seq_length,
            self._seed,
            shuffle=trains,
            vocab_size=self._vocab_size,
            cut=self._config.packing == "cut",
            marking=self._marking,
        )

    def require_separate_splits(self) -> None:
        """See that no dataset that is held out is a copy of one that is trained on, or of one held out otherwise.

        Raises:
            DataError: one is.
        """
        config = self._config
        splits = {"datasets": config.mixed, "validation": config.validation, "test": config.test}
        seen: dict[str, tuple[str, str]] = {}
        for split, entries in splits.items():
            for entry in entries:
                _, manifest = self._open(entry.prefix)
                for key in (_identity(entry.prefix), *([manifest.bin_sha256] if manifest else [])):
                    other_split, other = seen.setdefault(key, (split, entry.prefix))
                    if other_split != split:
                        raise DataError(
                            f"data.{split}: {entry.prefix} holds the same tokens as {other} of data.{other_split}, but "
                            "no document may be in two splits; give another dataset, or use data.split"
                        )

    def _open(self, prefix: str) -> tuple[IndexedDataset, Manifest | None]:
        if prefix not in self._datasets:
            manifest = read_manifest(prefix)
            sha256 = None if manifest is None else manifest.idx_sha256
            dataset = IndexedDataset(prefix, manifest is None, cache_of(self._config), sha256)
            if manifest is not None:
                _check_manifest(prefix, manifest, dataset, self._vocab_size)
            if self._tokenizer is not None:
                _check_tokenizer(prefix, manifest, self._tokenizer, self._vocab_size)
                require_document_ends(self._config, dataset, manifest, self._tokenizer.eod_id)
            self._datasets[prefix] = dataset, manifest
        return self._datasets[prefix]


def cache_of(config: DataConfig) -> Cache:
    """The cache for datasets in object stores."""
    folder = None if config.cache_directory is None else Path(config.cache_directory)
    return Cache(folder, int(config.cache_gb * 1e9))


def _identity(prefix: str) -> str:
    """The same for two prefixes of one file."""
    path = dataset_file(prefix, ".bin")
    return str(path) if isinstance(path, RemotePath) else os.path.realpath(path)


def _check_manifest(prefix: str, manifest: Manifest, dataset: IndexedDataset, vocab_size: int) -> None:
    manifest.require_fits(prefix, dataset.num_documents, dataset.num_tokens)
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} but dataset {prefix} was made with {manifest.vocab_size} tokens"
            f" ({manifest.tokenizer_file}); set model.vocab_size={manifest.vocab_size}"
        )


def _check_tokenizer(prefix: str, manifest: Manifest | None, tokenizer: Tokenizer, vocab_size: int) -> None:
    if manifest is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"data.tokenizer={tokenizer.path} ({tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}...) is not"
            f" the tokenizer of data.prefix={prefix} ({manifest.tokenizer_file}, {manifest.vocab_size} tokens,"
            f" sha256 {manifest.tokenizer_sha256[:12]}...); give that one or rebuild the dataset"
        )
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} but tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens;"
            f" set model.vocab_size={tokenizer.vocab_size}"
        )
