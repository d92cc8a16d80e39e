"""The `data` section of the run config."""

from pathlib import PurePath
from typing import Annotated, Any

from pydantic import Field, Strict

from megagpt.plan.section import NonNegative, Positive, Section

Weight = Annotated[float, Field(ge=0)]


class NamedPrefix(Section):
    """A dataset, and what it is called."""

    prefix: str
    """Path without .bin/.idx, as written by tools/preprocess_data.py."""
    name: str | None = None
    """What messages and metrics call it; null: the last part of its prefix."""

    @property
    def label(self) -> str:
        """Its name."""
        return PurePath(self.prefix).name if self.name is None else self.name


class DatasetConfig(NamedPrefix):
    """One dataset of a mixture; all have a weight, or all have epochs or tokens, or none has any of them."""

    weight: Weight | None = None
    """Its share of the samples, in any unit that is common to all datasets."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """How often it is read while the others are read as often as they say."""
    tokens: Positive | None = None
    """How many of its tokens are read, instead of epochs."""


class MixtureStage(Section):
    """A mixture that takes over during the run."""

    from_tokens: Positive
    """Tokens of the run (of all datasets) after which it begins."""
    weights: dict[str, Weight]
    """New weight of each dataset, by name; those left out are not read any more."""


class FillInMiddle(Section):
    """Training on documents that are cut in three and put in another order."""

    rate: Annotated[float, Field(gt=0, le=1)]
    """Share of the documents that are rearranged."""
    spm_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of these that begin with the suffix, the others with the prefix."""
    prefix_token: str = "<|fim_prefix|>"
    """Special token of the tokenizer that begins the prefix."""
    middle_token: str = "<|fim_middle|>"
    """Special token that begins the middle."""
    suffix_token: str = "<|fim_suffix|>"
    """Special token that begins the suffix."""


class DataConfig(Section):
    """Where the tokens come from."""

    prefix: str | None = None
    """Dataset as written by tools/preprocess_data.py: the path without .bin/.idx. It may be the URL of an object store
    (s3://BUCKET/NAME, and what else fsspec knows)."""
    datasets: Annotated[tuple[DatasetConfig, ...], Strict(False)] = ()
    """Several datasets that are mixed, instead of `prefix`; a list of sections. Without weights each has a share that
    grows with its size."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Datasets without weights have shares proportional to size ** (1 / temperature): 1 reads all equally often, larger
    values read small ones more often."""
    stages: Annotated[tuple[MixtureStage, ...], Strict(False)] = ()
    """How the mixture changes during the run; a list of sections. A run resumes with the very same samples, also if
    stages are added that begin later."""
    tokenizer: str | None = None
    """Tokenizer (sentencepiece .model, tokenizer.json or its folder, .tiktoken); checked against the dataset, carried
    into exports."""
    split: Annotated[tuple[float, float, float], Strict(False)] = (90.0, 5.0, 5.0)
    """Shares of the documents of each dataset for train, validation and test."""
    validation: Annotated[tuple[NamedPrefix, ...], Strict(False)] = ()
    """Datasets for validation, a list of sections; with these or `test` all other documents are for training and
    `split` is not used."""
    test: Annotated[tuple[NamedPrefix, ...], Strict(False)] = ()
    """Datasets for the test at the end of the run, a list of sections."""
    prefetch: NonNegative = 4
    """Micro-batches that a thread of each rank reads ahead; 0 reads each when it is needed."""
    fill_in_middle: FillInMiddle | None = None
    """Fill-in-the-middle (arXiv 2207.14255) on training samples, a section of its own; null: none."""
    verify_checksums: bool = False
    """Read all files at each start, and stop if one is not as its manifest says (bit rot, a file put in its place)."""
    cache_directory: str | None = None
    """Folder on a disk of each host for parts of datasets in object stores, which its processes share; null: one in the
    system's folder for temporary files."""
    cache_gb: Annotated[float, Field(gt=0)] = 20.0
    """Most that these parts take there; a dataset that does not fit is fetched again and again. Its index is kept, too,
    and not counted."""

    @property
    def mixed(self) -> tuple[DatasetConfig, ...]:
        """The datasets that are trained on: those of `datasets`, or the one of `prefix`, which has no name."""
        if self.prefix is None:
            return self.datasets
        return (DatasetConfig(prefix=self.prefix, name=""),)

    def mixture_until(self, tokens: int) -> dict[str, Any]:
        """The keys that decide how the first `tokens` tokens of a run are mixed, without where the datasets lie."""
        amounts = [entry.model_dump(include={"weight", "epochs", "tokens"}) for entry in self.datasets]
        given = [
            {"name": entry.label, **{key: value for key, value in amount.items() if value is not None}}
            for entry, amount in zip(self.datasets, amounts, strict=True)
        ]
        stages = [stage.model_dump() for stage in self.stages if stage.from_tokens < tokens]
        return {"datasets": given, "temperature": self.temperature, "stages": stages}

    @property
    def has_held_out_files(self) -> bool:
        """Whether validation and test have datasets of their own, so that no documents are split off."""
        return bool(self.validation or self.test)
