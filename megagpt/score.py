"""The loss of a saved model on held-out text, on any number of ranks and in any layout."""

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoint import CheckpointReader
from megagpt.data.run_data import HeldOut, open_data, open_whole
from megagpt.engine import Engine, build_engine
from megagpt.errors import CheckpointError, DataError, MegagptError
from megagpt.evaluate import evaluate_all
from megagpt.parallel.console import Console
from megagpt.parallel.launch import Launch
from megagpt.parallel.ranks import Ranks, start_ranks, stop_ranks
from megagpt.plan import Plan
from megagpt.plan.data_config import NamedPrefix
from megagpt.storage import Location
from megagpt.storage.local import write_whole

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Score:
    """How well a model predicts one dataset."""

    split: str | None
    """`validation` or `test`; None: a dataset that was given, all of it."""
    dataset: str
    """Its name, or its prefix if it has none."""
    loss: float
    """Mean per token, in nats."""
    perplexity: float
    samples: int
    tokens: int


def score_checkpoint(
    plan: Plan,
    launch: Launch,
    folder: Location,
    splits: tuple[str, ...] = SPLITS,
    datasets: tuple[str, ...] = (),
    most_samples: int | None = None,
    verbose: bool = False,
) -> list[Score]:
    """Load a checkpoint and take its loss on text; collective.

    Args:
        plan: as `evaluation_plan` makes it.
        launch: this process's place.
        folder: the checkpoint.
        splits: of the run's own data, if no `datasets` are given.
        datasets: prefixes to take instead.
        most_samples: of each dataset, from its beginning.
        verbose: show what libraries print.

    Raises:
        DataError: text is missing, damaged, too short or made with another tokenizer.
        CheckpointError: the checkpoint is damaged or does not fit the model.
    """
    console = Console(launch.rank, verbose)
    parts = _open(plan, splits, datasets)
    with console.muted():
        ranks = start_ranks(plan, launch)
        engine = build_engine(plan, ranks, draws_weights=False)
    scores = []
    with contextlib.closing(engine):
        load_weights(folder, engine, plan, ranks)
        for split, part in parts:
            found = evaluate_all(engine, part.stream, plan, ranks, most_samples)
            name = part.name or str(plan.run.data.mixed[0].prefix)
            scores.append(Score(split, name, found.loss, _perplexity(found.loss), found.samples, found.tokens))
    stop_ranks()
    return scores


def load_weights(folder: Location, engine: Engine, plan: Plan, ranks: Ranks) -> None:
    """Give an engine the weights of a checkpoint, and nothing else of it; collective. Each tensor is compared with its
    hash.

    Raises:
        CheckpointError: on all ranks, if one cannot read its part.
    """
    problem = None
    try:
        reader = CheckpointReader(folder)
        if missing := set(engine.parameters) - set(reader.names):
            raise CheckpointError(f"{folder} has no {', '.join(sorted(missing)[:3])}; it is of another model")
        for name in engine.parameters:
            shard = reader.shard(name, "weight", ranks.tensor_rank, ranks.tensor_size, plan.padded_vocab_size)
            if tuple(shard.shape) != (shape := engine.shard_shape(name)):
                raise CheckpointError(f"{folder}: {name} is {list(shard.shape)}, the model wants {list(shape)}")
            engine.load_weight(name, shard)
    except MegagptError as error:
        problem = str(error)
    if problems := [found for found in ranks.gather_objects(problem) if found]:
        raise CheckpointError(problems[0])


def write_scores(path: Path, scores: list[Score], plan: Plan, folder: Location, step: int) -> None:
    """Write what was found as JSON, whole or not at all."""
    tree: dict[str, Any] = {
        "checkpoint": str(folder),
        "step": step,
        "precision": plan.precision,
        "layout": {
            "world_size": plan.world_size,
            "tensor": plan.tensor_parallel_size,
            "context": plan.context_parallel_size,
            "pipeline": plan.pipeline_parallel_size,
            "data": plan.data_parallel_size,
            "expert": plan.expert_parallel_size,
        },
        "seq_length": plan.seq_length,
        "results": [asdict(score) for score in scores],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(tree, indent=2) + "\n").encode())


def _open(plan: Plan, splits: tuple[str, ...], datasets: tuple[str, ...]) -> list[tuple[str | None, HeldOut]]:
    data = plan.run.data
    if datasets:
        entries = [NamedPrefix(prefix=prefix, name=prefix) for prefix in datasets]
        return [(None, part) for part in open_whole(entries, data, plan.model.vocab_size, plan.seq_length)]
    opened = open_data(data, plan.model.vocab_size, plan.seq_length, plan.run.training.seed)
    parts = [(split, part) for split in splits for part in getattr(opened, split)]
    if not parts:
        raise DataError(
            f"the run has no text for {' or '.join(splits)} (data.split={list(data.split)}, sequences of "
            f"{plan.seq_length}); give datasets by --data"
        )
    return [(split, part) for split, part in parts]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
