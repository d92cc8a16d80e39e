"""Choosing the next token, and continuing a prompt with a model."""

import math
from types import SimpleNamespace

import pytest
import torch
from ranks import in_own_process
from tiny import tiny_plan

from megagpt.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.usefixtures("libraries")

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def chosen(draws: int = 400, logits=None, **sampling) -> set[int]:
    """The tokens that come up in many draws."""
    from megagpt.generate import Sampling, _choose

    logits = PROBABILITIES.log() if logits is None else logits
    generator = torch.Generator().manual_seed(0)
    return {_choose(logits, Sampling(**sampling), generator) for _ in range(draws)}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {1}),
        ({"temperature": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_k": 1}, {1}),
        ({"temperature": 1.0, "top_k": 2}, {1, 3}),
        ({"temperature": 1.0, "top_k": 99}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_p": 0.39}, {1}),
        ({"temperature": 1.0, "top_p": 0.41}, {1, 3}),  # the token that crosses the border belongs to the set
        ({"temperature": 1.0, "top_p": 0.89}, {1, 2, 3}),
        # top_p counts what top_k leaves: 0.4 / 0.7 is more than a half
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, {1}),
        ({"temperature": 1e-3}, {1}),
        ({"temperature": 1e-300}, {1}),
    ],
    ids=str,
)
def test_which_tokens_can_be_chosen(sampling, expected):
    assert chosen(**sampling) == expected


def test_frequencies_follow_the_temperature():
    from megagpt.generate import Sampling, _choose

    for temperature in (0.5, 1.0, 2.0):
        generator = torch.Generator().manual_seed(1)
        sampling = Sampling(temperature=temperature)
        draws = torch.tensor([_choose(PROBABILITIES.log(), sampling, generator) for _ in range(4000)])
        expected = PROBABILITIES ** (1 / temperature) / (PROBABILITIES ** (1 / temperature)).sum()
        assert draws.bincount(minlength=4) / 4000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0 is not in"),
        ({"temperature": math.nan}, "--temperature=nan is not in"),
        ({"temperature": math.inf}, "--temperature=inf is not in"),
        ({"top_k": -1}, "--top-k=-1 is negative"),
        ({"top_p": 0.0}, "--top-p=0.0 is not in"),
        ({"top_p": 1.5}, "--top-p=1.5 is not in"),
    ],
    ids=str,
)
def test_senseless_sampling_is_refused(sampling, words):
    from megagpt.generate import Sampling

    with pytest.raises(ConfigError, match=words):
        Sampling(**sampling)


class Letters:
    """A tokenizer of 250 tokens: a letter is its code point."""

    path, vocab_size, eod_id = "letters", 250, 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def untrained_model():
    """A model of 250 tokens, whose vocabulary is padded to 256, and what stands for its checkpoint."""
    from megagpt.engine.weights import named_parameters
    from megagpt.model import GPT, initialize_weights
    from megagpt.parallel.ranks import start_single_process

    plan = tiny_plan("llama")
    assert plan.padded_vocab_size == 256
    start_single_process()
    model = GPT(plan).eval()
    initialize_weights(named_parameters(model, plan), plan, 0)
    return model, SimpleNamespace(run=plan.run)


def continued(untrained, prompt: str, count: int, tokenizer=None, **sampling) -> list[int]:
    from megagpt.generate import Sampling, generate

    return list(generate(*untrained, tokenizer or Letters(), prompt, count, Sampling(**sampling)))


@in_own_process
def test_padding_tokens_are_never_chosen():
    untrained = untrained_model()
    model, _ = untrained
    with torch.no_grad():
        model.head.weight[250:] = 100 * model.head.weight[:6]  # would win if they were seen
    for seed in range(20):
        assert all(token < 250 for token in continued(untrained, "a", 30, temperature=5.0, seed=seed))
        assert all(token < 250 for token in continued(untrained, chr(ord("a") + seed), 3))


@in_own_process
def test_the_seed_decides():
    untrained = untrained_model()
    first, again, other = (continued(untrained, "abc", 12, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert continued(untrained, "abc", 12, seed=3) == continued(untrained, "abc", 12, seed=4), "greedy needs no seed"


@in_own_process
def test_generation_ends_where_the_context_is_full():
    untrained = untrained_model()
    assert len(continued(untrained, "a" * 30, 100, temperature=1.0)) == 2  # 32 positions
    assert len(continued(untrained, "a", 5, temperature=1.0)) == 5
    assert continued(untrained, "a", 0) == []
    with pytest.raises(ConfigError, match=r"the prompt has 32 tokens but the model's context is 32; shorten it"):
        continued(untrained, "a" * 32, 1)


@in_own_process
def test_generation_ends_with_the_document():
    untrained = untrained_model()
    tokens = continued(untrained, "abc", 12)
    tokenizer = Letters()
    tokenizer.eod_id = tokens[3]
    assert continued(untrained, "abc", 12, tokenizer) == tokens[: tokens.index(tokens[3])]


@in_own_process
def test_unusable_prompts_and_tokenizers_are_refused():
    untrained = untrained_model()
    with pytest.raises(ConfigError, match="the prompt is empty"):
        continued(untrained, "", 3)
    with pytest.raises(ConfigError, match="--max-new-tokens=-1 is negative"):
        continued(untrained, "a", -1)
    tokenizer = Letters()
    tokenizer.vocab_size = 300
    with pytest.raises(DataError, match="tokenizer letters has 300 tokens but the model 250; give the one that"):
        continued(untrained, "a", 3, tokenizer)


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    from megagpt.generate import load_model

    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_model(tmp_path)
