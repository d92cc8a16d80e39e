"""Our own model, exported, computes the same logits in transformers: the whole way from Megatron-Core to a folder."""

import pytest
import torch
from convert_reference import MODELS, model_of, random_weights
from ranks import run_ranks

from megagpt.convert.canonical import canonical_shapes
from megagpt.convert.verify import compare_logits
from megagpt.convert.writer import write_hf_folder
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")


def build(model):
    """A GPT on one process whose parameters hold `random_weights`, and the full tensors read back from it."""
    from megagpt.engine.weights import named_parameters
    from megagpt.model import GPT, partition_of
    from megagpt.parallel.ranks import start_single_process

    start_single_process()
    keys = model.model_dump(exclude={"preset"})
    run = run_config_from_dict({"model": keys, "training": {"steps": 1}})
    tree = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    plan = make_plan(run, deepspeed_config_from_dict(tree), 1)
    gpt = GPT(plan).eval()
    weights, tensors = random_weights(model), {}
    with torch.no_grad():
        for name, parameter in named_parameters(gpt, plan):
            partition = partition_of(name, model.is_gated)
            parameter.copy_(partition.shard(weights[name], 0, 1, parameter.shape[0]))
            tensors[name] = partition.join([parameter.detach()], model.vocab_size)
    return gpt, tensors


def export_and_compare(names, folder):
    reports = {}
    for name in names:
        model = model_of(name)
        gpt, tensors = build(model)
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == canonical_shapes(model)
        tokens_BS = torch.randint(0, model.vocab_size, (2, 32), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            logits_BSV = gpt(tokens_BS).transpose(0, 1)[..., : model.vocab_size]
        write_hf_folder(folder / name, model, tensors.__getitem__, tensors, None)
        reports[name] = compare_logits(folder / name, tokens_BS, logits_BSV)
    return reports


def test_every_family(tmp_path):
    [reports] = run_ranks(export_and_compare, 1, list(MODELS), tmp_path)
    assert set(reports) == set(MODELS)
    for name, report in reports.items():
        assert report.passed, f"{name}: {report}"
        assert report.top1_agreement == 1, f"{name}: {report}"
