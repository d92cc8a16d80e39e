"""Elementwise functions that the compiler can take whole, and the decision to let it."""

import pytest
import torch
from ranks import in_own_process
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")


class Device:
    """A stand-in for a GPU: whether it can compile is planted."""

    type = "cuda"


def plan_of(**training):
    return tiny_plan(sections={"training": training})


@pytest.fixture
def fusion(monkeypatch):
    from megagpt.model import fusion as module

    monkeypatch.setattr(module.Fusable, "are_fused", False)
    monkeypatch.setattr(module, "_obstacle", lambda device: "")
    return module


def test_gpus_compile_if_all_ranks_can(fusion):
    assert fusion.fuse(plan_of(), Device(), lambda mine: [mine, ""]) is None
    assert fusion.Fusable.are_fused
    said = fusion.fuse(plan_of(), Device(), lambda mine: [mine, "InductorError: no C compiler"])
    assert said.startswith("elementwise functions are not compiled, which costs time: rank 1: InductorError: no C comp")
    assert not fusion.Fusable.are_fused, "no rank, or their roundings would differ"


def test_cpus_do_not_nor_who_does_not_want_it(fusion):
    def gather(mine):
        raise AssertionError("nobody is to be asked")

    assert fusion.fuse(plan_of(), torch.device("cpu"), gather) is None
    assert fusion.fuse(plan_of(compile=False), Device(), gather) is None
    assert not fusion.Fusable.are_fused


def test_a_host_without_a_compiler_says_so(monkeypatch):
    from megagpt.model import fusion as module

    def refuse(function):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(torch, "compile", refuse)
    assert module._obstacle(torch.device("cpu")).startswith("RuntimeError: Failed to find C compiler.")
    monkeypatch.setattr(torch, "compile", lambda function: lambda tensor: tensor)
    assert module._obstacle(torch.device("cpu")) == "the compiled probe is wrong"


def cases():
    """Each function that can be fused, with arguments."""
    from megagpt.model import activation, loss, rotary, token_dispatcher

    torch.manual_seed(0)
    query, key, _ = torch.randn(6, 2, 4, 24).split(8, -1)
    angles = torch.rand(6, 1, 1, 8)
    projected, grad = torch.randn(12, 20), torch.randn(12, 10)
    logits, labels = (torch.randn(12, 30) * 3).bfloat16(), torch.randint(0, 25, (12,))
    largest, normalisers, factors = torch.full((12,), 9.0), torch.rand(12) + 1, torch.rand(12)
    return {
        "rotary": (rotary._turned, query, key[:, :, :2], angles.cos(), angles.sin()),
        "rotary, partial": (rotary._turned, query, key, angles.cos()[..., :4], angles.sin()[..., :4]),
        **{f"{name}": (activation._gated, projected, name) for name in activation.GATES},
        **{f"{name}, backward": (activation._gradient_of_gated, grad, projected, name) for name in activation.GATES},
        "gate, weighted": (activation._weighted, projected, factors, "swiglu"),
        "gate, weighted, backward": (activation._gradients_of_weighted, grad, projected, factors, "swiglu"),
        "sums of copies": (token_dispatcher._sums, projected, torch.randperm(12).view(4, 3)),
        "loss": (loss._largest, logits, 28, None),
        "loss, sums": (loss._sums, logits, labels, largest, 28, None),
        "loss, capped": (loss._sums, logits, labels, largest, 28, 5.0),
        "loss, backward": (loss._write_gradients, logits, labels, largest, normalisers, factors, 28, None),
        "loss, capped, backward": (loss._write_gradients, logits, labels, largest, normalisers, factors, 28, 5.0),
    }


@in_own_process
def test_the_compiler_takes_each_function_whole():
    for name, (function, *arguments) in cases().items():
        whole = torch.compile(function.eager, fullgraph=True, backend="aot_eager")
        others = [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        torch.testing.assert_close(whole(*others), function.eager(*arguments), msg=name)
        tensors = [[given for given in list_ if isinstance(given, torch.Tensor)] for list_ in (others, arguments)]
        torch.testing.assert_close(*tensors, msg=name)  # some write to what they are given


@in_own_process
def test_experts_with_any_number_of_tokens_need_few_kernels():
    from torch._dynamo.testing import CompileCounter

    from megagpt.model import activation

    counter = CompileCounter()
    compiled = torch.compile(activation._gated.eager, backend=counter)
    for tokens in (17, 5, 0, 1, 33, 2, 100, 0, 1, 64, 3):
        projected = torch.randn(tokens, 64)
        assert torch.equal(compiled(projected, "swiglu"), activation._gated.eager(projected, "swiglu"))
    assert counter.frame_count <= 4


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@in_own_process
def test_rotation_is_megatron_cores(fraction):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megagpt.model.rotary import Rotary, rotate

    torch.manual_seed(0)
    angles = RotaryEmbedding(8, fraction, use_cpu_initialization=True)
    rotary = Rotary(angles)
    query = torch.randn(6, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(6, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    tables = rotary.tables(6, 3, torch.float64)
    for turned, heads in zip(rotate(query, key, tables), (query, key), strict=True):
        torch.testing.assert_close(turned, _apply_rotary_pos_emb_bshd(heads, angles(6, 3, packed_seq=True)))
    assert torch.autograd.gradcheck(lambda query, key: rotate(query, key, tables), (query, key))
    positions_Bs = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 1, 2, 0, 1, 2]])
    at_positions = rotate(query, key, rotary.tables_at(positions_Bs, 9, torch.float64))[0]
    torch.testing.assert_close(at_positions[:, 0], rotate(query, key, tables)[0][:, 0])
    again = rotary.tables(3, 0, torch.float64)
    torch.testing.assert_close(at_positions[3:, 1], rotate(query[3:], key[3:], again)[0][:, 1])
