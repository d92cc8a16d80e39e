"""A mixture of datasets as one stream of samples: which dataset gives the next sample, and which of its samples.

Both are functions of the global index alone. Each dataset goes through its own epochs, and goes on where it was when
the mixture changes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from megagpt.data.apportion import Apportionment
from megagpt.data.marking import MarkedSample
from megagpt.errors import ConfigError
from megagpt.plan.data_config import DataConfig
from megagpt.plan.data_rules import SMALLEST_SHARE

_STEPS = 1 << 40  # shares that are no ratio of whole numbers are rounded to multiples of 1 / _STEPS


class Samples(Protocol):
    """An endless stream of samples."""

    @property
    def seq_length(self) -> int:
        """Tokens of a sample that are predicted."""
        ...

    def __len__(self) -> int:
        """Samples of one epoch."""
        ...

    def sample(self, global_index: int) -> np.ndarray:
        """The sample that a run sees after `global_index` others: int64 [seq_length + 1]."""
        ...

    def marked(self, global_index: int) -> MarkedSample:
        """The same sample, with its documents and what is learnt of them."""
        ...


class Origin(NamedTuple):
    """Where a sample of a mixture comes from."""

    stage: int
    """Which part of the run, from 0."""
    dataset: int
    """Which dataset, in the order of the config."""
    number: int
    """Samples of this dataset that the run has seen before."""


@dataclass(frozen=True)
class MixtureStep:
    """What holds from some sample of the run on."""

    first_sample: int
    """Samples of the run before it."""
    shares: tuple[Fraction, ...]
    """Share of each dataset; they add up to 1."""


class Mixture:
    """An endless sequence of samples out of several datasets; nothing is read.

    Attributes:
        names: of the datasets.
        steps: the parts of the run, in order.
    """

    def __init__(self, names: Sequence[str], steps: Sequence[MixtureStep]):
        """Describe the sequence; finds out how many samples of each dataset precede each step."""
        assert steps[0].first_sample == 0, "the first step begins with the run"
        self.names, self.steps = tuple(names), tuple(steps)
        self._firsts = [step.first_sample for step in steps]
        self._sequences = [Apportionment(step.shares) for step in steps]
        self._before = [[0] * len(names)]
        for stage, behind in enumerate(self._firsts[1:]):
            self._before.append(self._counts_in(stage, behind))

    def origin(self, global_index: int) -> Origin:
        """Where the sample comes from that a run sees after `global_index` others."""
        stage = bisect_right(self._firsts, global_index) - 1
        dataset, number = self._sequences[stage].draw(global_index - self._firsts[stage])
        return Origin(stage, dataset, self._before[stage][dataset] + number)

    def counts(self, num_samples: int) -> list[int]:
        """Samples of each dataset among the first `num_samples` of the run."""
        return self._counts_in(bisect_right(self._firsts, num_samples) - 1, num_samples)

    def _counts_in(self, stage: int, behind: int) -> list[int]:
        drawn = self._sequences[stage].counts(behind - self._firsts[stage])
        return [before + more for before, more in zip(self._before[stage], drawn, strict=True)]


class MixedStream:
    """The samples of a mixture. `len(stream)` is the number of samples of one epoch of all datasets together."""

    def __init__(self, mixture: Mixture, streams: Sequence[Samples]):
        """Describe the stream.

        Args:
            mixture: which dataset comes when.
            streams: one per dataset, with samples of one length.
        """
        self.mixture, self.streams = mixture, tuple(streams)

    def __len__(self) -> int:
        return sum(len(stream) for stream in self.streams)

    @property
    def seq_length(self) -> int:
        """Tokens of a sample that are predicted."""
        return self.streams[0].seq_length

    def sample(self, global_index: int) -> np.ndarray:
        """The sample that a run sees after `global_index` others: int64 [seq_length + 1].

        Raises:
            DataError: a token is outside the vocabulary.
        """
        origin = self.mixture.origin(global_index)
        return self.streams[origin.dataset].sample(origin.number)

    def marked(self, global_index: int) -> MarkedSample:
        """The same sample, with its documents and what is learnt of them.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        origin = self.mixture.origin(global_index)
        return self.streams[origin.dataset].marked(origin.number)


def make_mixture(config: DataConfig, samples_per_epoch: Sequence[int], seq_length: int) -> Mixture:
    """The mixture of a run config.

    Args:
        config: the `data` section.
        samples_per_epoch: samples of each dataset, in the order of the config.
        seq_length: tokens of a sample that are predicted.

    Raises:
        ConfigError: a dataset that is to be read is far too small beside the others.
    """
    datasets = config.mixed
    names = [entry.label for entry in datasets]
    if all(entry.weight is not None for entry in datasets):
        shares = _as_shares([_exact(entry.weight or 0.0) for entry in datasets])
    else:
        shares = _as_shares(_amounts(config, samples_per_epoch, seq_length))
    for name, share in zip(names, shares, strict=True):
        if 0 < share < SMALLEST_SHARE:
            raise ConfigError(
                f"data.datasets: {name} would have a share of {float(share):.1e}, less than {SMALLEST_SHARE:g}; leave "
                "it out, or give the datasets weights"
            )
    steps = [MixtureStep(0, shares)]
    for stage in config.stages:
        weights = _as_shares([_exact(stage.weights.get(name, 0.0)) for name in names])
        steps.append(MixtureStep(-(-stage.from_tokens // seq_length), weights))
    return Mixture(names, steps)


def _amounts(config: DataConfig, samples_per_epoch: Sequence[int], seq_length: int) -> list[Fraction]:
    """What is read of each dataset while the others are read as much as they say, in samples."""
    amounts = []
    for entry, samples in zip(config.mixed, samples_per_epoch, strict=True):
        if entry.tokens is not None:
            amounts.append(Fraction(entry.tokens, seq_length))
        elif entry.epochs is not None:
            amounts.append(_exact(entry.epochs) * samples)
        elif config.temperature == 1:
            amounts.append(Fraction(samples))
        else:
            relative = (samples / max(samples_per_epoch)) ** (1 / config.temperature)
            amounts.append(Fraction(max(round(relative * _STEPS), 1), _STEPS))
    return amounts


def _exact(number: float) -> Fraction:
    """The number as it is written: 0.1 is a tenth."""
    return Fraction(repr(number))


def _as_shares(weights: Sequence[Fraction]) -> tuple[Fraction, ...]:
    total = sum(weights, Fraction(0))
    return tuple(weight / total for weight in weights)
