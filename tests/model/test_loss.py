"""Head and loss as one: equal to cross-entropy on whole logits, in chunks, over tensor-parallel ranks, in 16 bit."""

import pytest
import torch
from ranks import in_own_process, run_ranks
from tiny import tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

TOKENS, HIDDEN, VOCABULARY, PADDED = 50, 24, 90, 128


LOSS_TOKENS = 17.0
"""What a sum of losses is divided by where some labels do not count: those of a whole batch, say."""


def example(dtype: torch.dtype, masked: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    if masked:
        labels[torch.rand(TOKENS, generator=generator) < 0.4] = -100
        labels[16:33] = -100  # with chunks of 16, all of one
    return hidden, weight, labels


def exact(dtype: torch.dtype, softcap: float | None = None, masked: bool = False) -> list[torch.Tensor]:
    """Loss and gradients for a loss of weight 3, in fp64 from the same inputs."""
    hidden, weight, labels = example(dtype, masked)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t())[:, :VOCABULARY]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")  # 0 where the label is -100
    loss = losses.sum() / (LOSS_TOKENS if masked else TOKENS)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))]


def found(
    dtype: torch.dtype,
    tokens_per_chunk: int,
    tensor_size: int = 1,
    softcap: float | None = None,
    masked: bool = False,
    fused: bool = False,
) -> list[torch.Tensor]:
    """The same from `head_loss`, on this rank's part of the vocabulary; `fused`: by what GPUs compile, run as it is."""
    from megatron.core import tensor_parallel

    from megagpt.model import loss as module
    from megagpt.model.fusion import Fusable
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks, start_single_process

    Fusable.are_fused = fused
    Fusable.compiled = property(lambda function: function.eager)
    module.head_chunk_tokens = lambda *_: tokens_per_chunk
    module.CACHED_BYTES = 7 * 4 * PADDED  # some rows at a time, the last time fewer
    ranks = start_ranks(tiny_plan(tp=2), detect_launch()) if tensor_size > 1 else start_single_process()
    hidden, weight, labels = example(dtype, masked)
    loss_tokens = torch.tensor(LOSS_TOKENS) if masked else None
    rows = PADDED // tensor_size
    weight = weight[ranks.tensor_rank * rows :][:rows].clone().requires_grad_()
    hidden.requires_grad_()
    num_real = min(max(VOCABULARY - ranks.tensor_rank * rows, 0), rows)
    copied = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    loss = module.head_loss(copied, weight, labels, num_real, softcap, loss_tokens)
    with torch.no_grad():
        without = module.head_loss(hidden, weight, labels, num_real, softcap, loss_tokens)
        assert without == loss, "without gradients"
    (3 * loss).backward()
    assert loss.dtype is torch.float32
    assert hidden.grad.dtype is weight.grad.dtype is dtype
    return [x.detach().double().numpy() for x in (loss, hidden.grad, weight.grad)]


def largest_difference(results: list, dtype: torch.dtype, softcap: float | None = None, masked: bool = False) -> float:
    """Relative to the largest entry, over loss and both gradients; `results` has one entry per rank."""
    expected = exact(dtype, softcap, masked)
    actual = [torch.tensor(results[0][0]), torch.tensor(results[0][1])]
    actual.append(torch.cat([torch.tensor(weight) for *_, weight in results]))
    pairs = zip(actual, expected, strict=True)
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)


@pytest.mark.parametrize("tokens_per_chunk", [TOKENS, 16, 1])
def test_chunks_give_the_loss_and_gradients_of_the_whole(tokens_per_chunk):
    results = run_ranks(found, 1, torch.float32, tokens_per_chunk)
    assert largest_difference(results, torch.float32) < 1e-6


def test_the_vocabulary_may_be_cut_over_ranks():
    results = run_ranks(found, 2, torch.float32, 16, tensor_size=2)
    assert largest_difference(results, torch.float32) < 1e-6
    assert (results[0][1] == results[1][1]).all(), "ranks agree on the gradient of the hidden states"


@pytest.mark.parametrize(("tensor_size", "tokens_per_chunk"), [(1, TOKENS), (1, 16), (2, 16)])
def test_labels_below_zero_do_not_count(tensor_size, tokens_per_chunk):
    results = run_ranks(found, tensor_size, torch.float32, tokens_per_chunk, tensor_size=tensor_size, masked=True)
    assert largest_difference(results, torch.float32, masked=True) < 1e-6
    assert (results[0][1][16:33] == 0).all(), "nothing flows back from them"


def test_logits_may_be_soft_capped():
    results = run_ranks(found, 2, torch.float32, 16, tensor_size=2, softcap=4.0)
    assert largest_difference(results, torch.float32, softcap=4.0) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_what_gpus_compile_is_the_same(tensor_size, softcap, masked):
    options = {"softcap": softcap, "masked": masked}
    results = run_ranks(found, tensor_size, torch.float32, 16, tensor_size=tensor_size, fused=True, **options)
    assert largest_difference(results, torch.float32, **options) < 1e-6
    results = run_ranks(found, tensor_size, torch.bfloat16, 16, tensor_size=tensor_size, fused=True, **options)
    assert largest_difference(results, torch.bfloat16, **options) < 2**-6


@pytest.mark.parametrize("tokens_per_chunk", [TOKENS, 16])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_in_16_bit_only_rounding_differs(dtype, limit, tokens_per_chunk):
    assert largest_difference(run_ranks(found, 1, dtype, tokens_per_chunk), dtype) < limit


def test_logits_never_exist_in_whole():
    from megagpt.plan.estimates import SMALLEST_CHUNK_BYTES, head_chunk_tokens

    assert head_chunk_tokens(100, 1000, 64) == 100
    for tokens, vocabulary, hidden in [(8192, 128256, 4096), (4096, 32000, 768), (7, 10**9, 1)]:
        size = head_chunk_tokens(tokens, vocabulary, hidden)
        assert 4 * size * vocabulary <= max(SMALLEST_CHUNK_BYTES, 4 * vocabulary * hidden)
        assert size < tokens


@in_own_process
def test_memory_is_that_of_a_chunk():
    from megagpt.model import loss as module
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    module.head_chunk_tokens = lambda *_: 8
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(1024, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = module.head_loss(hidden, weight, torch.zeros(512, dtype=torch.int64), 1024)
    assert kept == []
    loss.backward()
    assert weight.grad.shape == weight.shape
