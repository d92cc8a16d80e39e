"""Documents that are kept apart, padded samples and masked losses give one curve on every layout, and the right one."""

import pytest
import torch
from ranks import in_own_process, run_ranks
from tiny import SGD, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")

RESET = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
SPANS = {"loss_spans": {"start": "<|im_start|>", "end": "<|im_end|>"}}
FULL, SELECTIVE = ({"recompute_granularity": kind} for kind in ("full", "selective"))
LAYOUTS = {
    "documents apart, TP 2 x PP 2, SP": ("llama", RESET, {"tp": 2, "pp": 2, "sp": True}),
    "learned positions, CP 2 x PP 2, recomputed": ("gpt2", RESET, {"cp": 2, "pp": 2, "recompute": FULL}),
    "windows and spans, PP 4, recomputed": ("qwen3", {**RESET, **SPANS}, {"pp": 4, "recompute": SELECTIVE}),
    "soft caps and padding, TP 2 x DP 2, SP": ("gemma", {"packing": "cut"}, {"tp": 2, "sp": True, "dp": 2}),
    "experts and padding, CP 2 x PP 2": ("mixtral", {"packing": "cut"}, {"cp": 2, "pp": 2}),
    "experts and padding, EP 2 x TP 2, SP": ("mixtral", {"packing": "cut"}, {"tp": 2, "sp": True, "dp": 2, "ep": 2}),
    "spans, DP 4, ZeRO 3": ("llama", SPANS, {"dp": 4, "zero": 3}),
    "spans and padding, CP 2 x PP 2": ("neox", {"packing": "cut", **SPANS}, {"cp": 2, "pp": 2}),
    "first tokens, TP 2 x DP 2, ZeRO 2": ("llama", {"packing": "truncate"}, {"tp": 2, "dp": 2, "zero": 2}),
}


def plan_of(name: str):
    model, data, layout = LAYOUTS[name]
    return tiny_plan(model, SGD, steps=6, sections={"data": data}, **layout)


def reference_curves(plans):
    """Losses and norms of plain torch loops around the same models."""
    from megagpt.parallel.ranks import start_single_process
    from megagpt.verify.measure import _run
    from megagpt.verify.shrink import single_plan

    start_single_process()
    found = [_run(single_plan(plan), torch.float32) for plan in plans]
    return [(one.losses, one.norms) for one in found]


def engine_curves(plans):
    from megagpt.verify.measure import measure_runs

    return [(one.losses, one.norms) for one in measure_runs(plans)]


@pytest.fixture(scope="module")
def curves(libraries):
    """By layout: the curve of one process, and that of each rank."""
    plans = [plan_of(name) for name in LAYOUTS]
    (expected,) = run_ranks(reference_curves, 1, plans)
    by_rank = run_ranks(engine_curves, 4, plans)
    return dict(zip(LAYOUTS, zip(expected, zip(*by_rank, strict=True), strict=True), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_single_process_curve(curves, name):
    (losses, norms), found = curves[name]
    assert len(found) == 4
    for rank_losses, rank_norms in found:
        assert rank_losses == pytest.approx(losses, abs=1e-5)
        assert rank_norms == pytest.approx(norms, rel=1e-5)
    assert losses[-1] != pytest.approx(losses[0], abs=0.02), "the model must change, or the comparison says little"


def model_and_batches(model, data, count):
    """A model in this process and micro-batches as the engine takes them."""
    from megagpt.engine.batches import prepare
    from megagpt.engine.weights import named_parameters
    from megagpt.model import GPT, initialize_weights
    from megagpt.parallel.ranks import start_single_process
    from megagpt.verify.measure import _batches

    start_single_process()
    plan = tiny_plan(model, SGD, sections={"data": data})
    built = GPT(plan)
    initialize_weights(named_parameters(built, plan), plan, 0)
    batches = _batches(plan)
    return built.double(), [(batch, prepare(batch, plan.run.data, torch.device("cpu"))) for batch, _ in
                            zip(batches, range(count), strict=False)]  # fmt: skip


def losses_of(model, tokens_S, labels_S):
    """Sum of the losses of a text by itself."""
    logits_S1V = model(tokens_S[None])
    return torch.nn.functional.cross_entropy(logits_S1V[:, 0].float(), labels_S, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma", "qwen3"])
@pytest.mark.parametrize(
    "data", [RESET, {"packing": "cut"}, {"packing": "cut", **SPANS}], ids=["apart", "cut", "spans"]
)
@in_own_process
def test_documents_of_a_sample_are_computed_as_if_alone(model, data):
    """Loss and gradients of a micro-batch are those of its documents, run one by one without padding."""
    model, batches = model_and_batches(model, data, 3)
    for batch, prepared in batches:
        model.zero_grad()
        # In fp64 up to the logits; the head's own loss is fp32.
        logits_SBV = model(prepared.tokens_BS, documents=prepared.documents)
        loss = torch.nn.functional.cross_entropy(
            logits_SBV.flatten(0, 1).float(), prepared.labels_BS.t().flatten(), ignore_index=-100, reduction="sum"
        )
        loss.backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        alone = 0.0
        for tokens_S, labels_S, runs in zip(*batch[:2], prepared.documents.runs, strict=True):
            real = sum(runs)
            for part in zip(tokens_S[:real].split(runs), labels_S[:real].split(runs), strict=True):
                if (part[1] != -100).any():
                    one = losses_of(model, *part)
                    one.backward()
                    alone += float(one)
        assert float(loss) == pytest.approx(alone, rel=1e-6)
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            # Terms that cancel leave the rounding of the largest ones.
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=float(1e-6 * gradient.abs().max()))


@in_own_process
def test_the_loss_is_the_mean_over_what_is_learnt():
    """Of a whole step, however unevenly it lies in its micro-batches."""
    model, batches = model_and_batches("llama", SPANS, 4)
    model.float()
    learnt = [int((batch.labels_BS != -100).sum()) for batch, _ in batches]
    assert len(set(learnt)) > 1
    found = sum(float(model(*prepared)) for _, prepared in batches) / len(batches)
    sums = [
        float(losses_of(model, *row))
        for batch, _ in batches
        for row in zip(batch.tokens_BS, batch.labels_BS, strict=True)
    ]
    assert found == pytest.approx(sum(sums) / sum(learnt), rel=1e-5)


def counts_of_a_step(plan):
    """Tokens that the routers of a layer counted in one step."""
    from megagpt.engine import build_engine
    from megagpt.model import take_router_counts
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks
    from megagpt.verify.measure import _batches

    ranks = start_ranks(plan, detect_launch())
    engine = build_engine(plan, ranks)
    engine.train_step(_batches(plan, ranks), 0.1)
    counts = take_router_counts(engine._module, plan.model.num_layers, plan.model.num_experts, ranks.device)
    places = [batch.places_BS for batch, _ in zip(_batches(plan, ranks), range(plan.num_microbatches), strict=False)]
    return int(counts.tokens[0].sum()), int((torch.stack(places) >= 0).sum()) * plan.model.moe_router_topk


def test_padding_is_not_counted_by_routers():
    plan = tiny_plan("mixtral", SGD, sections={"data": {"packing": "cut"}})
    ((counted, expected),) = run_ranks(counts_of_a_step, 1, plan)
    assert counted == expected
