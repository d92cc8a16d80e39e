"""Every layout gives the loss curve and gradient norms of one process without DeepSpeed."""

import pytest
import torch
from ranks import run_ranks

from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")

STEPS, GLOBAL_BATCH, MICRO_BATCH, SEQUENCE = 20, 8, 2, 32

LLAMA = dict(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96, vocab_size=250)
GPT2 = dict(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    vocab_size=131,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    activation="gelu_tanh",
    add_bias_linear=True,
    untie_embeddings_and_output_weights=False,
)
NEOX = dict(GPT2, position_embedding_type="rope", rotary_percent=0.5, parallel_residual=True, activation="gelu")
MODELS = {"llama": LLAMA, "gpt2": GPT2, "neox": NEOX}
ADAM = dict(name="adamw", lr=1e-3, min_lr=1e-3)
# Adam hides errors in the scale of gradients; SGD with clipping does not.
SGD = dict(name="sgd", lr=0.5, min_lr=0.5, weight_decay=0.0)


def plan_of(model, optimizer, tp=1, pp=1, dp=1, zero=1, precision="fp32", sp=False, steps=STEPS, **training):
    run = run_config_from_dict(
        {
            "model": {**MODELS[model], "max_position_embeddings": SEQUENCE},
            "parallel": {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "sequence_parallel": sp,
                "make_vocab_size_divisible_by": 16,
            },
            "optimizer": optimizer,
            "training": {"steps": steps, **training},
        }
    )
    tree = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": zero},
    }
    if precision == "bf16":
        tree |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return make_plan(run, deepspeed_config_from_dict(tree), tp * pp * dp)


def micro_batch(step: int, first: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples first ... first+1 of a step: arithmetic sequences, learnable at once."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, vocab_size, (GLOBAL_BATCH, 1), generator=generator)
    stride = torch.randint(1, 5, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + torch.arange(SEQUENCE + 1) * stride) % vocab_size
    part = tokens[first : first + MICRO_BATCH]
    return part[:, :-1].contiguous(), part[:, 1:].contiguous()


def reference_curve(plan) -> list[tuple[float, float]]:
    """Loss and gradient norm per step of a plain torch loop around the same model."""
    from megagpt.engine.engine import named_parameters
    from megagpt.model import GPT, initialize_weights
    from megagpt.optim import build_optimizer
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    model = GPT(plan)
    initialize_weights(named_parameters(model, plan), plan, 0)
    optimizer = build_optimizer(named_parameters(model, plan), plan)
    curve = []
    for step in range(plan.run.training.steps):
        total = 0.0
        for first in range(0, GLOBAL_BATCH, MICRO_BATCH):
            loss = model(*micro_batch(step, first, plan.model.vocab_size)) * MICRO_BATCH / GLOBAL_BATCH
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((total, norm.item()))
    return curve


def engine_curve(plan) -> list[tuple[float, float]]:
    """Loss and gradient norm per step under DeepSpeed, on this rank."""
    from megagpt.engine import build_engine
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    curve = []
    for step in range(plan.run.training.steps):
        firsts = [(m * ranks.data_size + ranks.data_rank) * MICRO_BATCH for m in range(plan.num_microbatches)]
        batches = iter([micro_batch(step, first, plan.model.vocab_size) for first in firsts])
        result = engine.train_step(batches, plan.run.optimizer.lr)
        curve.append((float(result.loss), float(result.grad_norm)))
    return curve


@pytest.fixture(scope="module")
def reference(libraries):
    cache = {}

    def get(model, optimizer):
        key = (model, optimizer["name"])
        if key not in cache:
            cache[key] = run_ranks(reference_curve, 1, plan_of(model, optimizer, zero=1))[0]
        return cache[key]

    return get


LAYOUTS = [
    ("llama", ADAM, dict()),
    ("llama", ADAM, dict(tp=2)),
    ("llama", ADAM, dict(pp=2)),
    ("llama", ADAM, dict(dp=2)),
    ("llama", ADAM, dict(tp=2, pp=2)),
    ("llama", SGD, dict(tp=2, pp=2)),
    ("llama", SGD, dict(pp=2, dp=2)),
    ("llama", SGD, dict(tp=2, dp=2)),
    ("llama", SGD, dict(tp=2, dp=2, zero=2)),
    ("llama", SGD, dict(tp=2, dp=2, zero=3)),
    ("llama", SGD, dict(tp=2, pp=2, sp=True)),
    ("llama", SGD, dict(tp=2, pp=2, recompute_granularity="full")),
    ("gpt2", ADAM, dict(tp=2, pp=2)),
    ("gpt2", SGD, dict(tp=2, pp=2)),
    ("gpt2", SGD, dict(tp=2, sp=True)),
    ("gpt2", SGD, dict(pp=2, dp=2)),
    ("neox", SGD, dict(tp=2, pp=2)),
]


@pytest.mark.parametrize(
    ("model", "optimizer", "layout"), LAYOUTS, ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}{v[k]}" for k in v if k != "weight_decay")
)
def test_layout_gives_the_single_process_curve(reference, model, optimizer, layout):
    plan = plan_of(model, optimizer, **layout)
    expected = reference(model, optimizer)
    curves = run_ranks(engine_curve, plan.world_size, plan)
    for curve in curves:
        losses, norms = zip(*curve, strict=True)
        expected_losses, expected_norms = zip(*expected, strict=True)
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert losses[-1] < losses[0] - 0.2, "the model must learn, or the comparison says little"
