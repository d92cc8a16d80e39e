"""The model by itself: padding of the vocabulary, initial weights, causality, loss."""

import math

import pytest
import torch
from ranks import in_own_process, run_ranks
from tiny import MODELS, micro_batch, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")


def built(plan):
    """The model of a plan with its initial weights, in this process."""
    from megagpt.engine.weights import named_parameters
    from megagpt.model import GPT, initialize_weights
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    model = GPT(plan)
    initialize_weights(named_parameters(model, plan), plan, 0)
    return model


def padded_to(divisor: int, model: str, **options):
    return tiny_plan(model, sections={"parallel": {"make_vocab_size_divisible_by": divisor}}, **options)


@in_own_process
def test_padding_changes_neither_loss_nor_gradients():
    for name in MODELS:
        results = []
        for divisor in (1, 64, 512):
            plan = padded_to(divisor, name)
            model = built(plan)
            loss = model(*micro_batch(0, 0, plan.model.vocab_size))
            loss.backward()
            gradients = {n: p.grad[: plan.model.vocab_size] for n, p in model.named_parameters()}
            table = model.embedding.word_embeddings.weight
            assert table.shape[0] == plan.padded_vocab_size
            assert not table.grad[plan.model.vocab_size :].any(), "padding learns nothing"
            results.append((loss.item(), gradients))
        assert plan.padded_vocab_size == 512
        for loss, gradients in results[1:]:
            assert loss == pytest.approx(results[0][0], abs=1e-6)
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(gradient, results[0][1][parameter], rtol=1e-4, atol=1e-6)


@in_own_process
def test_logits_of_padding_are_minus_infinity():
    for name in MODELS:
        plan = padded_to(64, name)
        model = built(plan).eval()
        tokens, _ = micro_batch(0, 0, plan.model.vocab_size)
        logits_SBV = model(tokens)
        assert logits_SBV.shape == (32, 2, plan.padded_vocab_size)
        assert (logits_SBV[..., plan.model.vocab_size :] == -math.inf).all()
        assert logits_SBV[..., : plan.model.vocab_size].isfinite().all()


@in_own_process
def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    for name in MODELS:
        plan = tiny_plan(name)
        model = built(plan).eval()
        tokens_BS, labels_BS = micro_batch(0, 0, plan.model.vocab_size)
        for loss_mode in (torch.no_grad, torch.enable_grad):
            with loss_mode():
                loss = model(tokens_BS, labels_BS)
        expected = torch.nn.functional.cross_entropy(model(tokens_BS).permute(1, 2, 0), labels_BS)
        assert loss.dtype is torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@in_own_process
def test_no_position_sees_a_later_one():
    for name in MODELS:
        plan = tiny_plan(name)
        model = built(plan).eval()
        tokens_BS, _ = micro_batch(0, 0, plan.model.vocab_size)
        changed_BS = tokens_BS.clone()
        changed_BS[:, 20:] = (changed_BS[:, 20:] + 7) % plan.model.vocab_size
        with torch.no_grad():
            before, after = model(tokens_BS), model(changed_BS)
        torch.testing.assert_close(after[:20], before[:20], rtol=0, atol=1e-6)
        assert not torch.allclose(after[20:, :, :100], before[20:, :, :100], atol=1e-3)


@in_own_process
def test_positions_matter():
    for name in MODELS:
        plan = tiny_plan(name)
        model = built(plan).eval()
        with torch.no_grad():
            logits_SBV = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))  # equal sets, other orders
        difference = (logits_SBV[3, 0] - logits_SBV[3, 1])[:100].abs().max()
        assert difference > 1e-5, name


@in_own_process
def test_initial_weights_have_the_spread_that_is_asked_for():
    plan = tiny_plan("llama", sections={"model": {"init_method_std": 0.05}})
    weights = dict(built(plan).named_parameters())
    layers = plan.model.num_layers
    assert weights["embedding.word_embeddings.weight"][:250].std().item() == pytest.approx(0.05, rel=0.05)
    assert weights["layers.1.block.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.05, rel=0.05)
    residual = weights["layers.1.block.mlp.linear_fc2.weight"].std().item()
    assert residual == pytest.approx(0.05 / math.sqrt(2 * layers), rel=0.05)
    assert (weights["final_norm.weight"] == 1).all()
    first, second = (weights[f"layers.{i}.block.mlp.linear_fc1.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    other = built(tiny_plan("llama", sections={"training": {"seed": 99}}))
    assert not torch.equal(other.layers[0].block.mlp.linear_fc1.weight, first)


def initial_shards(plan) -> dict[str, list[float]]:
    """Full initial weights as this rank's stage holds them, joined over its tensor-parallel ranks."""
    import torch.distributed as dist

    from megagpt.engine import build_engine
    from megagpt.model.partition import partition_of
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    whole = {}
    for name, parameter in build_engine(plan, ranks).parameters.items():
        shards = [torch.empty_like(parameter) for _ in range(ranks.tensor_size)]
        dist.all_gather(shards, parameter.detach().contiguous(), group=ranks.tensor_group)
        whole[name] = partition_of(name, plan.model.is_gated).join(shards, plan.model.vocab_size).numpy()
    return whole


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_initial_weights_depend_neither_on_layout_nor_on_padding(model):
    (expected,) = run_ranks(initial_shards, 1, tiny_plan(model))
    found: dict = {}
    for part in run_ranks(initial_shards, 4, padded_to(64, model, tp=2, pp=2)):
        found |= part
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert (found[name] == weights).all(), name
