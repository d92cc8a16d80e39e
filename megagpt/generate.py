"""Run a trained model in one process: load it from a checkpoint of any layout, continue a prompt."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint import CheckpointReader, find_checkpoint
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.model import GPT, canonical_name
from megagpt.parallel.ranks import start_single_process
from megagpt.plan import Plan, deepspeed_config_from_dict, make_plan, run_config_from_dict
from megagpt.plan.recompute import FULL_ONLY_KEYS
from megagpt.storage import Location


def single_process_plan(reader: CheckpointReader) -> Plan:
    """The Plan of a checkpoint's model in one process, fp32, whatever layout trained it."""
    tree = reader.run.model_dump(mode="json")
    tree["parallel"] = {"make_vocab_size_divisible_by": reader.run.parallel.make_vocab_size_divisible_by}
    tree["checkpoint"] = tree["logging"] = {}  # of no use here, and perhaps of a place that this host does not know
    for key in ("recompute_granularity", *FULL_ONLY_KEYS):
        tree["training"].pop(key)
    config = deepspeed_config_from_dict({"train_batch_size": 1})
    return make_plan(run_config_from_dict(tree, source=str(reader.folder)), config, 1)


def open_checkpoint(path: Location) -> CheckpointReader:
    """A checkpoint whose files are all there; the content of a tensor is compared with its hash when it is read.

    Args:
        path: a checkpoint, or the checkpoint directory of a run (its newest one is taken).

    Raises:
        CheckpointError: there is no checkpoint, or a file of it is missing or truncated.
    """
    reader = CheckpointReader(find_checkpoint(path))
    if problems := reader.problems(with_hash=False):
        raise CheckpointError("\n".join(f"{problem}; use another checkpoint" for problem in problems))
    return reader


def load_model(path: Location) -> tuple[GPT, CheckpointReader]:
    """The model of a checkpoint with its fp32 master weights, in evaluation mode.

    Args:
        path: a checkpoint, or the checkpoint directory of a run (its newest one is taken).

    Raises:
        CheckpointError: there is no checkpoint, a file of it is damaged, or its parameters are not this model's.
    """
    reader = open_checkpoint(path)
    ranks = start_single_process()
    plan = single_process_plan(reader)
    model = GPT(plan).to(ranks.device)
    named = {canonical_name(name, plan.model.num_layers): weight for name, weight in model.named_parameters()}
    if missing := set(named) ^ set(reader.names):
        raise CheckpointError(f"{reader.folder}: parameters {sorted(missing)} are in only one of checkpoint and model")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(reader.shard(name, "weight", 0, 1, plan.padded_vocab_size))
    return model.eval(), reader


def tokenizer_path(reader: CheckpointReader, given: str | None) -> str | None:
    """Where the tokenizer is: as given, else as the run config says; None if neither says anything.

    Raises:
        DataError: the file that the run config names is not there (any more).
    """
    named = reader.run.data.tokenizer
    if given is None and named is not None and not Path(named).exists():
        raise DataError(
            f"data.tokenizer={named} of the run does not exist, seen from {Path.cwd()}; give --tokenizer PATH"
        )
    return given or named


def model_logits(model: GPT, tokens_BS: Tensor, vocab_size: int) -> Tensor:
    """Logits [B, S, vocabulary] in fp32 on the CPU, without the vocabulary's padding."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(tokens_BS.to(device))[..., :vocab_size].transpose(0, 1).float().cpu()


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; higher is more random."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (Holtzman et al. 2020); of those that
    top_k leaves."""
    seed: int = 0
    """Seed of the choice."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature={self.temperature} is not in [0, inf); 0 is greedy, about 0.8 varied")
        if self.top_k < 0:
            raise ConfigError(f"--top-k={self.top_k} is negative; 0 means all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p={self.top_p} is not in (0, 1]; 1 means all tokens")


def generate(
    model: GPT, reader: CheckpointReader, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling
) -> Iterator[int]:
    """Token ids that continue a prompt, one by one, until the end-of-document token or the model's context is full.

    Raises:
        ConfigError: the prompt is empty or longer than the context, or max_new_tokens is negative.
        DataError: the tokenizer does not fit the model.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"--max-new-tokens={max_new_tokens} is negative; give 0 or more")
    vocab_size = reader.run.model.vocab_size
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens but the model {vocab_size}; give the one "
            "that it was trained with"
        )
    context = reader.run.model.max_position_embeddings
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ConfigError("the prompt is empty; give at least one character")
    if len(tokens) >= context:
        raise ConfigError(f"the prompt has {len(tokens)} tokens but the model's context is {context}; shorten it")
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(min(max_new_tokens, context - len(tokens))):
        logits_V = model_logits(model, torch.tensor([tokens]), vocab_size)[0, -1]
        token = _choose(logits_V, sampling, generator)
        if token == tokenizer.eod_id:
            return
        tokens.append(token)
        yield token


def _choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V, tokens = logits_V.double().sort(descending=True)
    if sampling.top_k:
        logits_V, tokens = logits_V[: sampling.top_k], tokens[: sampling.top_k]
    # The largest is 0 whatever the temperature, so that none is too small to divide by.
    probabilities = torch.softmax((logits_V - logits_V[0]) / sampling.temperature, -1)
    # The token that crosses top_p still belongs to the set.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * (before < sampling.top_p)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
