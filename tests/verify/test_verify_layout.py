"""A right layout passes every verdict; each planted fault is found, by the quantity that it spoils."""

import contextlib
import json
from unittest import mock

import pytest
from ranks import run_ranks
from tiny import SGD, tiny_plan

pytestmark = pytest.mark.usefixtures("libraries")


def nothing(ranks):
    return contextlib.nullcontext()


def no_summed_gradients(ranks):
    """Norms and biases of sequence-parallel regions keep each rank's own gradient."""
    return mock.patch("megagpt.engine.weights.sum_partial_gradients")


def untied(ranks):
    """The two copies of the tied embedding go their own ways."""
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return mock.patch.dict(PipelineEngine._INSTRUCTION_MAP, {schedule.ReduceTiedGrads: lambda self: None})


def other_norm_on_one_tensor_rank(ranks):
    return changed_start(ranks.tensor_rank == 1, "final_norm.weight")


def other_weight_on_one_tensor_rank(ranks):
    # not on one data-parallel rank: DeepSpeed broadcasts the first one's weights
    return changed_start(ranks.tensor_rank == 1, "layers.0.self_attention.linear_proj.weight")


def changed_start(here: bool, name: str):
    from megagpt.engine import weights

    original = weights.initialize_weights

    def initialize(named, *args, **options):
        named = list(named)
        original(named, *args, **options)
        for parameter_name, parameter in named:
            if here and parameter_name == name:
                parameter.data.add_(0.01)

    return mock.patch.object(weights, "initialize_weights", initialize)


def no_tensor_parallel_marks(ranks):
    """DeepSpeed takes split parameters for copies, so that the gradient norm is too small."""
    return mock.patch("deepspeed.runtime.zero.stage_1_and_2.is_model_parallel_parameter", return_value=False)


def gradients_not_reduced_on_one_rank(ranks):
    import deepspeed.comm

    original = deepspeed.comm.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        return original(tensor.clone() if ranks.data_rank == 1 and tensor.numel() > 100 else tensor, *args, **kwargs)

    return mock.patch.object(deepspeed.comm, "all_reduce", all_reduce)


def loss_not_divided(ranks):
    """Gradients are summed over micro-batches, not averaged."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine.backward

    def backward(self, loss, **kwargs):
        return original(self, loss * self.gradient_accumulation_steps(), **kwargs)

    return mock.patch.object(DeepSpeedEngine, "backward", backward)


def samples_given_twice(ranks):
    """All data-parallel ranks read the first one's samples."""
    from megagpt.verify import measure

    original = measure.train_batches
    return mock.patch.object(measure, "train_batches", lambda *a, **k: original(*a, **{**k, "data_parallel_rank": 0}))


def one_collective_too_many(ranks):
    """Right, but it sends bytes for nothing."""
    import torch

    from megagpt.engine import Engine

    original = Engine.train_step

    def train_step(self, *args):
        torch.distributed.all_reduce(torch.ones(10_000), group=ranks.tensor_group)
        return original(self, *args)

    return mock.patch.object(Engine, "train_step", train_step)


PIPELINE = {
    nothing: None,
    no_summed_gradients: "copies over ranks",
    untied: "tied copies",
    other_norm_on_one_tensor_rank: "copies over ranks",
    no_tensor_parallel_marks: "gradient norm",
}
SINGLE_STAGE = {
    nothing: None,
    other_weight_on_one_tensor_rank: "loss",
    gradients_not_reduced_on_one_rank: "weights",
    loss_not_divided: "gradient norm",
    samples_given_twice: "loss",
    one_collective_too_many: "bytes: tensor all_reduce",
}


def measure_with_faults(plan, faults) -> list:
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import release_groups, start_ranks
    from megagpt.verify.measure import measure_run

    measurements = []
    for fault in faults:
        ranks = start_ranks(plan, detect_launch())
        with fault(ranks):
            measurements.append(measure_run(plan, ranks))
        release_groups()
    return measurements


@pytest.mark.parametrize(
    ("model", "layout", "faults"),
    [("gpt2", {"tp": 2, "pp": 2, "sp": True}, PIPELINE), ("llama", {"tp": 2, "dp": 2}, SINGLE_STAGE)],
    ids=["pipeline", "single-stage"],
)
def test_planted_faults_are_found(model, layout, faults):
    from megagpt.verify.measure import measure_references
    from megagpt.verify.verdicts import judge

    plan = tiny_plan(model, SGD, steps=5, **layout)
    ((reference,),) = run_ranks(measure_references, 1, [plan])
    by_rank = run_ranks(measure_with_faults, 4, plan, list(faults))
    for (fault, spoiled), ranks in zip(faults.items(), zip(*by_rank, strict=True), strict=True):
        verdicts = judge(plan, ranks, reference)
        wrong = {verdict.quantity: verdict.difference for verdict in verdicts if not verdict.passed}
        assert wrong == {} if spoiled is None else spoiled in wrong, (fault.__name__, wrong)


def test_a_whole_run_is_verified_in_both_precisions():
    from megagpt.verify.layout import verify_layout

    long = {"model": {"num_layers": 8, "max_position_embeddings": 256}, "training": {"seq_length": 256}}
    plan = tiny_plan("llama", dp=2, zero=3, precision="bf16", sections=long)
    report = verify_layout(plan, steps=8)
    assert report.passed, report.text()
    (part,) = report.parts
    assert list(part.runs) == ["exact: fp32, sgd, ZeRO 3", "as configured: bf16, adamw, ZeRO 3"]
    assert report.as_dict()["passed"] is True
    assert "8 layers" in part.changes[0]


def test_the_command_names_what_is_wrong_and_fails(tmp_path, monkeypatch, capsys):
    from megagpt.verify.layout import Part, Report
    from megagpt.verify.verdicts import Verdict
    from tools import verify_layout as tool

    (tmp_path / "run.yaml").write_text("model: {preset: gpt2-124m}\ntraining: {steps: 3}\n")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}')
    verdicts = [Verdict("loss", 0.0, 1e-5), Verdict("gradient norm", 0.1, 1e-5, "relative")]
    words = [str(tmp_path / "run.yaml"), "--deepspeed_config", str(tmp_path / "ds.json"), "--world-size", "8"]
    for shown, status in ((verdicts, 1), (verdicts[:1], 0)):
        report = Report((Part(("8 ranks -> 2 ranks",), {"exact": shown}),), ("a stage between two others",))
        monkeypatch.setattr("megagpt.verify.layout.verify_layout", lambda *arguments, report=report: report)
        monkeypatch.setattr("sys.argv", ["verify_layout.py", *words, "--json", str(tmp_path / "found.json")])
        assert tool.main() == status
        printed = capsys.readouterr().out
        assert ("WRONG gradient norm" in printed) == (status == 1)
        assert ("THE LAYOUT IS WRONG" in printed) == (status == 1)
        assert "not verified, as it takes more than --max-ranks: a stage between two others" in printed
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["passed"] == (status == 0)
        assert found["parts"][0]["runs"]["exact"][0]["quantity"] == "loss"
