"""One weight in memory at a time computes what the whole model computes, for every kind of model."""

import pytest
import torch
from convert_reference import MODELS, model_of, random_weights
from ranks import run_ranks

from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")


class Weights:
    """Full tensors."""

    def __init__(self, weights):
        self.weights = weights

    def full(self, name, *, out):
        assert name not in ("embedding.word_embeddings.weight", "head.weight"), "never the whole of it"
        return out.copy_(self.weights[name])

    def vocabulary_rows(self, name, first, last, out):
        return out.copy_(self.weights[name][first:last])


def differences() -> dict[str, float]:
    from megagpt.engine.weights import named_parameters
    from megagpt.layerwise import LayerwiseGPT
    from megagpt.model import GPT, partition_of
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    found = {}
    tokens_BS = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(4))
    for name in MODELS:
        model = model_of(name)
        run = run_config_from_dict({"model": model.model_dump(exclude={"preset"}), "training": {"steps": 1}})
        plan = make_plan(run, deepspeed_config_from_dict({"train_batch_size": 1}), 1)
        weights, gpt = random_weights(model), GPT(plan).eval()
        with torch.no_grad():
            for canonical, parameter in named_parameters(gpt, plan):
                whole = partition_of(canonical, model.is_gated).shard(weights[canonical], 0, 1, parameter.shape[0])
                parameter.copy_(whole.bfloat16())
            expected_BSV = gpt(tokens_BS).transpose(0, 1)[..., : model.vocab_size]
        logits_BSV = LayerwiseGPT(plan, Weights(weights), torch.bfloat16).logits(tokens_BS)
        found[name] = float((logits_BSV - expected_BSV).abs().max() / expected_BSV.abs().max())
    return found


def test_every_kind_of_model():
    [found] = run_ranks(differences, 1)
    assert set(found) == set(MODELS)
    assert all(difference <= 1e-6 for difference in found.values()), found
