"""The `data` section of the run config."""

from pathlib import PurePath
from typing import Annotated, Any, Literal

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


class LossSpans(Section):
    """The parts of a text that are learnt, such as an assistant's turns of a chat; all the rest is only read."""

    start: str
    """Text behind which a span begins, such as "<|im_start|>assistant\\n"; special tokens are spelt out."""
    end: str | None = None
    """Text that ends a span and is still learnt, such as "<|im_end|>"; null: spans reach to the end of their document
    or to the next start."""


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
    packing: Literal["stream", "cut", "truncate"] = "stream"
    """What a sample holds: `stream` a piece of all documents joined; `cut` one document, padded to seq_length, or a
    piece of a longer one; `truncate` one document, without what is beyond seq_length. Padding is neither attended to
    nor predicted."""
    reset_attention_mask: bool = False
    """Tokens attend to their own document only; needs documents that end with the end-of-document token."""
    reset_position_ids: bool = False
    """Positions start from 0 in each document, not in each sample only; with the same need."""
    eod_mask_loss: bool = False
    """The first token of a document is not predicted from the end of the one before it; with the same need."""
    loss_spans: LossSpans | None = None
    """Learn only parts of the documents, a section of its own; null: all tokens. The loss of a step is the mean over
    all tokens of the global batch that are learnt."""
    read_by: Literal["leaders", "all"] = "leaders"
    """`leaders`: the first rank of each data-parallel replica reads, and sends to its tensor-, context- and
    pipeline-parallel ranks; `all`: every rank that needs samples reads them itself."""
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

    @property
    def marks_documents(self) -> bool:
        """Whether the model is told where documents begin and end."""
        return self.reset_attention_mask or self.reset_position_ids or self.packing != "stream"

    @property
    def masks_loss(self) -> bool:
        """Whether there are tokens that are not predicted."""
        return self.eod_mask_loss or self.packing != "stream" or self.loss_spans is not None

    @property
    def sample_options(self) -> dict[str, Any]:
        """The keys that decide what a sample holds and what is learnt of it."""
        keys = {"packing", "reset_attention_mask", "reset_position_ids", "eod_mask_loss", "loss_spans"}
        return self.model_dump(include=keys)

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
