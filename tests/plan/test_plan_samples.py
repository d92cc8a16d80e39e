"""Sample options that do not go together, and which ranks need samples and read them."""

import itertools
import re

import pytest

from megagpt.errors import ConfigError
from megagpt.verify.small_plans import small_plan

FILL = {"fill_in_middle": {"rate": 0.5}}
SPANS = {"loss_spans": {"start": "<|im_start|>", "end": "<|im_end|>"}}
FILES = {"prefix": "data", "tokenizer": "tokenizer.model"}


def problems_of(data, model="llama", **options):
    with pytest.raises(ConfigError) as caught:
        small_plan(model, sections={"data": data}, **options)
    return caught.value.problems


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"packing": "cut", "reset_attention_mask": True, "eod_mask_loss": True},
            "data.packing=cut puts one document into each sample, in which there is nothing to reset; remove "
            "data.reset_attention_mask and data.eod_mask_loss",
        ),
        (
            {"prefix": "data", "reset_position_ids": True},
            "data.reset_position_ids must know the tokens .*; set data.tokenizer",
        ),
        ({"prefix": "data", **SPANS}, "data.loss_spans must know the tokens .* set data.tokenizer"),
        ({**FILES, "packing": "truncate", **FILL}, "needs room for its tokens, which data.packing=truncate does not"),
        ({**FILES, **SPANS, **FILL}, "data.fill_in_middle moves parts .* remove one of them"),
        ({**FILES, "loss_spans": {"start": ""}}, "data.loss_spans: start and end must not be empty"),
        (
            {"packing": "cut", "datasets": [{"prefix": "a", "tokens": 10}, {"prefix": "b", "epochs": 1}]},
            "tokens are not what samples are counted by if data.packing=cut pads them; give epochs or weights",
        ),
    ],
)
def test_options_that_do_not_go_together(data, words):
    (problem,) = problems_of(data)
    assert re.search(words, problem)


def test_the_mean_over_tokens_of_a_router_must_not_depend_on_the_layout():
    for layout in ({"tp": 2, "sp": True}, {"cp": 2}):
        (problem,) = problems_of({"packing": "cut"}, "shared_expert", **layout)
        assert "model.moe_z_loss_coeff=0.1 with data.packing=cut would depend on how" in problem
    small_plan("shared_expert", sections={"data": {"packing": "cut"}}, dp=2)
    small_plan("shared_expert", sections={"data": {"reset_attention_mask": True}}, cp=2)


def test_ranks_that_need_samples():
    """Tensor parallel fastest, then context, data and pipeline; stages between need documents only."""
    plan = small_plan("llama", tp=2, dp=2, pp=4)
    assert plan.sample_ranks(0) == [0, 1, 12, 13]
    assert plan.sample_ranks(1) == [2, 3, 14, 15]
    assert [rank for rank in range(16) if plan.reads_samples(rank)] == [0, 2]
    told = small_plan("llama", tp=2, dp=2, pp=4, sections={"data": {"packing": "cut"}})
    assert told.sample_ranks(1) == [2, 3, 6, 7, 10, 11, 14, 15]
    assert [rank for rank in range(16) if told.reads_samples(rank)] == [0, 2]
    everyone = small_plan("llama", tp=2, dp=2, pp=4, sections={"data": {"read_by": "all"}})
    assert [rank for rank in range(16) if everyone.reads_samples(rank)] == [0, 1, 2, 3, 12, 13, 14, 15]
    whole = small_plan("llama", dp=4)
    assert all(whole.reads_samples(rank) for rank in range(4))


def test_the_layout_of_replicas_is_that_of_the_process_groups():
    plan = small_plan("llama", tp=2, cp=2, pp=2, dp=2)
    replicas = [plan.sample_ranks(data_rank) for data_rank in range(2)]
    assert sorted(itertools.chain(*replicas)) == list(range(16))
