"""A newer FlashAttention is used only where it has shown that it is right.

No GPU is needed: what is put in place of torch's attention is a stand-in, right or wrong, and the proof is the one that
a GPU has to pass.
"""

import pytest
import torch
import torch.nn.functional as F

from megagpt.errors import ConfigError
from megagpt.model import varlen
from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")

CPU = torch.device("cpu")
TORCHS = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _kernel_of_runs(monkeypatch):
    monkeypatch.setattr(varlen, "_is_used", True)


def plan_of(asked="auto", deterministic=False, **model):
    tree = {
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 100,
            "max_position_embeddings": 64,
            **model,
        },
        "training": {"steps": 1, "flash_attention": asked, "deterministic": deterministic},
    }
    raw = {"train_batch_size": 1, "bf16": {"enabled": True}}
    return make_plan(run_config_from_dict(tree), deepspeed_config_from_dict(raw, source="ds.json"), 1)


@pytest.fixture
def put(monkeypatch):
    """Puts a function in place of torch's attention for 16 bits, which gets its result."""

    def put(change):
        def attend(query, *args, **options):
            result = TORCHS(query, *args, **options)
            return change(result) if query.dtype is torch.bfloat16 else result

        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)

    return put


class WrongGradient(torch.autograd.Function):
    """The identity with a gradient that is off by a twentieth in the second sample."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.tensor([1.0, 1.05], dtype=gradient.dtype).view(2, 1, 1, 1)[: len(gradient)]


@pytest.mark.parametrize("model", [{}, {"sliding_window": 8}], ids=str)
def test_a_kernel_that_is_right_is_taken(put, model):
    from megagpt.model.flash_attention import prove

    trial = prove(lambda: put(lambda result: result.clone()), plan_of(**model), CPU)
    assert trial.is_good, trial.obstacle


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda result: result * 1.02, "in causal attention, the result is 2.1e-02 from that in fp64"),
        (lambda result: result.roll(1, dims=2), "in causal attention, the result is "),
        (lambda result: result * torch.nan, "the result is nan from"),
        (WrongGradient.apply, "the gradient of q is "),
        (
            lambda result: result if result.shape[2] == 512 else result * 1.05,
            "in causal attention of documents, the result is ",
        ),
    ],
    ids=["scaled", "shifted", "nan", "gradient", "documents"],
)
def test_a_kernel_that_is_wrong_is_not(put, change, words):
    from megagpt.model.flash_attention import prove

    trial = prove(lambda: put(change), plan_of(), CPU)
    assert not trial.is_good
    assert words in trial.obstacle


class Device:
    """A stand-in for a GPU that no GPU is needed for: the trials are planted."""

    type = "cuda"


def choose(monkeypatch, asked, planted, others=(), deterministic=False):
    """`choose_flash_attention` where this rank's trials are planted, by kernel; `others`: further ranks'."""
    from megagpt.model import flash_attention as module

    monkeypatch.setattr(module, "_try", lambda kernel, plan, device: planted.get(kernel.name, module.Trial(False)))
    monkeypatch.setattr(module, "torchs_kernel", lambda: None)
    restored = []
    monkeypatch.setattr(module, "restore", lambda: restored.append(1))
    plan = plan_of(asked, deterministic)
    said = module.choose_flash_attention(plan, Device(), lambda trial: [trial, *others])
    return said, bool(restored)


def test_the_first_kernel_that_is_right_on_all_ranks_is_used(monkeypatch):
    from megagpt.model.flash_attention import Trial

    good, bad = Trial(True), Trial(False, "the result is off")
    assert choose(monkeypatch, "auto", {}) == (None, True), "nothing is installed, nothing is said"
    said, is_restored = choose(monkeypatch, "auto", {"FA4": good})
    assert said.startswith("attention by FA4")
    said, is_restored = choose(monkeypatch, "auto", {"FA3": good, "FA4": good})
    assert said.startswith("attention by FA3")
    assert not is_restored
    said, is_restored = choose(monkeypatch, "FA4", {"FA3": good, "FA4": good})
    assert said.startswith("attention by FA4")
    said, is_restored = choose(monkeypatch, "auto", {"FA3": good}, others=[good, bad])
    assert said == "FA3 is installed but not used: rank 2: the result is off"
    assert is_restored
    assert choose(monkeypatch, "torch", {"FA3": good}) == (None, False)
    assert choose(monkeypatch, "auto", {"FA3": good}, deterministic=True) == (None, False), "it adds up in any order"


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_torchs_kernel_of_runs_has_to_be_right_too(monkeypatch, asked):
    from megagpt.model import flash_attention as module

    monkeypatch.setattr(module, "restore", lambda: None)
    monkeypatch.setattr(module, "_try", lambda kernel, plan, device: module.Trial(False))
    monkeypatch.setattr(module, "torchs_kernel", lambda: "kernel")
    seen = []

    def prove(activate, plan, device):
        seen.append(varlen._is_used)
        activate()
        seen.append(varlen._is_used)
        return module.Trial(True)

    monkeypatch.setattr(module, "prove", prove)
    assert module.choose_flash_attention(plan_of(asked), Device(), lambda trial: [trial]) is None
    assert seen == [False, True], "it is held against what is done without it"
    assert varlen._is_used

    def gather(trial):
        return [trial, module.Trial(False, "the result is off")] if trial.is_good else [trial]

    said = module.choose_flash_attention(plan_of(asked), Device(), gather)
    assert said == "torch's kernel for windows and documents is not used: rank 1: the result is off"
    assert not varlen._is_used


def test_one_that_was_asked_for_and_cannot_be_used_is_an_error(monkeypatch):
    from megagpt.model.flash_attention import Trial

    with pytest.raises(ConfigError, match=r"flash_attention=FA3 cannot be used on rank 0: it is not installed"):
        choose(monkeypatch, "FA3", {})
    with pytest.raises(ConfigError, match=r"rank 0: too old; use auto or torch"):
        choose(monkeypatch, "FA4", {"FA4": Trial(False, "too old")})


def test_hosts_without_gpus_do_not_care(monkeypatch):
    from megagpt.model.flash_attention import choose_flash_attention

    assert choose_flash_attention(plan_of("FA4"), CPU, lambda trial: [trial]) is None


def test_torch_knows_the_names():
    from megagpt.model.flash_attention import KERNELS

    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        pytest.skip("this torch knows no other FlashAttention than its own")
    assert {kernel.name for kernel in KERNELS} <= set(torch.nn.attention.list_flash_attention_impls())


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_package_that_is_not_there_is_no_obstacle(hopper, monkeypatch):
    """Activating is torch's own code here, and fails as it does where nothing is installed."""
    from megagpt.model import flash_attention as module

    monkeypatch.setattr(module, "prove", lambda activate, plan, device: activate())
    for kernel in module.KERNELS:
        assert module._try(kernel, plan_of(), CPU) == module.Trial(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert module._try(module.KERNELS[0], plan_of(), CPU) == module.Trial(False)


def test_a_package_that_lacks_another_one_is_told(hopper, monkeypatch):
    from megagpt.model import flash_attention as module

    def fail(name):
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.setattr(module, "activate", fail)
    trial = module._try(module.KERNELS[1], plan_of(), CPU)
    assert trial.obstacle == "ModuleNotFoundError: No module named 'cutlass'"


def test_a_torch_that_knows_one_kernel_only_uses_that(hopper, monkeypatch):
    from megagpt.model import flash_attention as module

    for name in ("activate_flash_attention_impl", "restore_flash_attention_impl"):
        monkeypatch.delattr(torch.nn.attention, name, raising=False)
    monkeypatch.setattr(module, "torchs_kernel", lambda: None)
    assert module.choose_flash_attention(plan_of(), Device(), lambda trial: [trial]) is None
    with pytest.raises(ConfigError, match="not installed there"):
        module.choose_flash_attention(plan_of("FA3"), Device(), lambda trial: [trial])


def test_cudnn_is_not_preferred_to_the_kernel(monkeypatch):
    from megagpt.model import flash_attention as module

    if not module.torch_can_change():
        pytest.skip("this torch knows no other FlashAttention than its own")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: None)
    module.activate("FA3")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    module.restore()
    assert torch.backends.cuda.cudnn_sdp_enabled()
