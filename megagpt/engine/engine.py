"""The only file that knows both DeepSpeed engines.

PipelineEngine runs the list of layers when there is more than one stage; DeepSpeedEngine runs the same list in one
module otherwise. Losses and norms stay on the device: nothing here waits for it.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from megagpt.engine.batches import Batch, PreparedBatch, prepare
from megagpt.engine.experts import expert_figures
from megagpt.engine.fragments import Fragment, groups_in_memory, is_on_disk, local_fragments, share_fp32_weights
from megagpt.engine.guard import Check, Judge, UpdateGuard
from megagpt.engine.loss_scale import own_loss_scaler
from megagpt.engine.phases import before_forward_passes, tell_phases
from megagpt.engine.pipeline import PlannedPipeline, pipeline_module
from megagpt.engine.swap_folder import SwapFolder, prepare_swap_folder
from megagpt.engine.weights import finish, finish_cut, named_parameters
from megagpt.errors import ConfigError
from megagpt.model import GPT, choose_flash_attention, fuse, group_experts, set_auxiliary_loss_scale
from megagpt.optim import build_optimizer
from megagpt.parallel.ranks import Ranks, set_group_timeout
from megagpt.plan import Plan
from megagpt.supervise.pulse import Phase, Pulse


@dataclass(frozen=True)
class StepResult:
    """What one update gives, on the device."""

    loss: Tensor
    """Mean loss per token that is learnt of the global batch before the update."""
    grad_norm: Tensor | float | None
    """2-norm of the global gradient before clipping; inf if the update was skipped."""
    loss_scale: float | None = None
    """Factor of the loss in this step's backward pass; None unless fp16."""
    skipped: bool = False
    """No rank updated its weights: in fp16 as a gradient overflowed on some rank, else because of a problem."""
    problem: str | None = None
    """What the judge has against this step's numbers."""


class Engine:
    """One model in training; the same for any number of pipeline stages.

    Args:
        plan: layout and batch.
        ranks: this process's place.
        module: what was handed to DeepSpeed.
        optimizer: torch's optimizer inside DeepSpeed's.
        wrapped: DeepSpeed's engine.
        pulse: told of each phase of each micro-batch.
        judge: asked before each update whether its loss and norm are to be trusted; None: all are.
        swap_folder: where the optimizer is, if on a disk.
        remark: what the user should know of how it computes.
        is_blank: its weights are zeros, and others must take their place.
    """

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        wrapped: Any,
        pulse: Pulse | None = None,
        judge: Judge | None = None,
        swap_folder: SwapFolder | None = None,
        remark: str | None = None,
        is_blank: bool = False,
    ):
        self.plan, self.ranks, self.pulse = plan, ranks, pulse or Pulse()
        self.remark, self.is_blank = remark, is_blank
        self.parameters = dict(named_parameters(module, plan, ranks.expert_rank))
        """This rank's parameters by canonical name."""
        self._module: Any = module
        self._optimizer, self._wrapped, self._swap_folder = optimizer, wrapped, swap_folder
        self._is_pipeline = isinstance(module, PipelineModule)
        self._loss_scaler = own_loss_scaler(wrapped.optimizer)
        self._guard = UpdateGuard(optimizer, wrapped.optimizer, ranks, judge)
        self._data_phase = Phase.DATA if plan.reads_samples(ranks.rank) else Phase.RECEIVE_SAMPLES
        if isinstance(module, PlannedPipeline):
            before_forward_passes(wrapped, module.feed.enter_forward)
            tell_phases(wrapped, self.pulse, self._data_phase)

    def train_step(
        self, batches: Iterator[Batch], learning_rate: float, *, rehearsal: bool = False, check: Check | None = None
    ) -> StepResult:
        """Take one global batch from `batches` and update the weights.

        Args:
            batches: this data-parallel rank's micro-batches, in order; whole samples, of which a context-parallel rank
                takes its positions. Stages between the first and the last take them if they are to know the documents.
            learning_rate: of this update.
            rehearsal: compute all but leave the weights as they are; needs a judge.
            check: asked before the update, besides the judge; needs one.
        """
        self._guard.is_rehearsal, self._guard.check = rehearsal, check
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        zero, is_fp16 = self._wrapped.optimizer, self.plan.precision == "fp16"
        loss_scale = float(zero.loss_scale) if is_fp16 else None
        # The engine divides the main loss by the number of micro-batches, and scales it for fp16. Gradients are
        # averaged over context-parallel ranks, but each one's auxiliary losses are its part of a sum.
        scale = (loss_scale or 1.0) * self.ranks.context_size / self.plan.num_microbatches
        set_auxiliary_loss_scale(scale, self.ranks.device)
        if self._is_pipeline:
            self._guard.begin_step(lambda: self._wrapped.total_loss, self.plan.num_microbatches)
            loss = self._wrapped.train_batch(self._module.feed.begin(map(self._prepared, batches)))
        else:
            loss = self._accumulate(batches)
        norm = self._wrapped.get_global_grad_norm()
        if self._loss_scaler is not None:
            self._loss_scaler.end_step()
        problem = self._guard.end_step(loss, is_fp16)
        skipped = problem is not None or (is_fp16 and bool(zero.overflow))
        if skipped and self.plan.deepspeed.offloads_optimizer and self.plan.zero_stage < 3:
            # DeepSpeed keeps the overflowed sums of offloaded gradients, and would add each later step's to them.
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        return StepResult(loss, norm, loss_scale, skipped, problem)

    def _accumulate(self, batches: Iterator[Batch]) -> Tensor:
        if not self._module.training:  # it takes milliseconds to tell all modules
            self._wrapped.train()
        total = torch.zeros((), device=self.ranks.device)
        self._guard.begin_step(lambda: total, self.plan.num_microbatches)
        for _ in range(self.plan.num_microbatches):
            if isinstance(self._wrapped.optimizer, BF16_Optimizer):
                # They have been added to the fp32 sums; DeepSpeed would keep them through the forward pass as zeros.
                self._wrapped.optimizer.clear_lp_grads(set_to_none=True)
            self.pulse.enter_next(self._data_phase)
            batch = self._prepared(next(batches))
            self.pulse.enter_next(Phase.FORWARD)
            loss = self._wrapped(*batch)
            total += loss.detach()
            self.pulse.enter_next(Phase.BACKWARD)
            self._wrapped.backward(loss)  # divides by the number of micro-batches
            self.pulse.enter(Phase.UPDATE)
            self._wrapped.step()
        return self._mean_over_replicas(total / self.plan.num_microbatches)

    def expert_figures(self) -> dict[str, float]:
        """How evenly the routers have spread the tokens since the last call; see `experts.py`. Collective."""
        return expert_figures(self._module, self.plan, self.ranks)

    def evaluate(self, batches: Iterator[Batch], num_batches: int) -> Tensor:
        """Mean loss per token of `num_batches` global batches, without dropout.

        Args:
            batches: this data-parallel rank's micro-batches.
            num_batches: global batches to take.
        """
        count = num_batches * self.plan.num_microbatches
        if self._is_pipeline:
            total = torch.zeros((), device=self.ranks.device)
            for _ in range(num_batches):
                part = self._module.feed.begin(map(self._prepared, batches))
                total += self._wrapped.eval_batch(part, num_micro_batches=self.plan.num_microbatches).squeeze()
            return total / num_batches
        self._wrapped.eval()
        total = torch.zeros((), device=self.ranks.device)
        with torch.no_grad():
            for index in range(count):
                self.pulse.enter(Phase.EVALUATE, index)
                total += self._wrapped(*self._prepared(next(batches)))
        return self._mean_over_replicas(total / count)

    def logits(self, tokens_BS: Tensor, rows: int, positions: int) -> Tensor | None:
        """First logits of one micro-batch, vocabulary whole and without padding.

        Args:
            tokens_BS: token ids, the same on all ranks; any number of samples and, without context parallelism, of
                positions (of which sequence parallelism takes a part per tensor-parallel rank).
            rows: samples whose logits are wanted, from the first.
            positions: positions whose logits are wanted, from the first.

        Returns:
            [rows, positions, vocabulary] in fp32 on the ranks of the last stage, None elsewhere. Collective.
        """
        if self._is_pipeline:
            batch = self._module.feed.begin(iter([self._prepared((tokens_BS, tokens_BS))]))
            self._wrapped.reset_activation_shape()  # stages have agreed on that of training
            _, prepared = self._wrapped.eval_batch(batch, return_logits=True, num_micro_batches=1)
            self._wrapped.reset_activation_shape()
            if prepared is None:
                return None
            with torch.no_grad():
                logits_SBV = self._module.loss_fn.logits(prepared)
        else:
            self._wrapped.eval()
            with torch.no_grad():
                logits_SBV = self._wrapped(self._prepared((tokens_BS, tokens_BS)).tokens_BS)
        logits_SBV = logits_SBV[:positions, :rows].contiguous()  # before gathering: the whole may not fit
        shards = [torch.empty_like(logits_SBV) for _ in range(self.ranks.tensor_size)]
        dist.all_gather(shards, logits_SBV, group=self.ranks.tensor_group)
        logits_SBV = torch.cat(shards, -1)[..., : self.plan.model.vocab_size].contiguous()
        chunks = [torch.empty_like(logits_SBV) for _ in range(self.ranks.context_size)]
        dist.all_gather(chunks, logits_SBV, group=self.ranks.context_group)
        return torch.cat(chunks)[:positions].transpose(0, 1).float()

    def fragments(self) -> list[Fragment]:
        """The parts of the fp32 master weights and moments that this rank owns; see `groups_in_memory`."""
        return local_fragments(self.parameters.items(), self._wrapped.optimizer, self.ranks.gradient_rank)

    def groups_in_memory(self, change: bool = False) -> Generator[list[Fragment], None, None]:
        """The fragments, in their order, in lists each of which is in memory until the next one is asked for, or the
        iterator is closed: one list of all, unless the optimizer is on a disk.

        Args:
            change: whether what is written to them is to be kept.
        """
        return groups_in_memory(self.fragments(), self._wrapped.optimizer, change)

    @property
    def optimizer_is_on_disk(self) -> bool:
        """Whether memory holds a part of the master weights and moments at a time."""
        return is_on_disk(self._wrapped.optimizer)

    def close(self) -> None:
        """Remove what the engine has on disks; no method may be called after it."""
        if self._swap_folder is not None:
            self._swap_folder.remove()

    def loss_scale_state(self) -> dict[str, float] | None:
        """Where dynamic loss scaling stands, the same on all ranks; None without it."""
        return None if self._loss_scaler is None else self._loss_scaler.state()

    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        """Go on from what `loss_scale_state` returned; nothing without dynamic loss scaling."""
        if self._loss_scaler is not None:
            self._loss_scaler.set_state(state)

    @torch.no_grad()
    def load_weight(self, name: str, shard: Tensor) -> None:
        """Set the weight that the forward pass uses (not the master copy).

        Args:
            name: canonical name.
            shard: this rank's tensor-parallel shard, any dtype.
        """
        parameter: Any = self.parameters[name]
        if hasattr(parameter, "ds_id"):
            part = parameter.ds_tensor
            mine = shard.flatten()[self.ranks.gradient_rank * part.numel() :][: part.numel()]
            part.data[: mine.numel()].copy_(mine)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay whole between steps
                parameter.data.copy_(shard)
        else:
            parameter.data.copy_(shard)

    def shard_shape(self, name: str) -> tuple[int, ...]:
        """Shape of this rank's tensor-parallel shard."""
        parameter: Any = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _prepared(self, batch: Batch) -> PreparedBatch:
        """This context-parallel rank's positions of a micro-batch, on its device. DeepSpeed, too, would move what the
        pipeline's stages load, but have the host wait for the device meanwhile."""
        ranks = self.ranks
        part = prepare(batch, self.plan.run.data, ranks.device, ranks.context_rank, ranks.context_size)
        return part.to(ranks.device)

    def _mean_over_replicas(self, value: Tensor) -> Tensor:
        # Parts of a sequence are equally long, so the mean over context-parallel ranks is the mean over positions;
        # where some are not learnt, all ranks have divided by the same number.
        if self.ranks.gradient_size > 1:
            dist.all_reduce(value, group=self.ranks.gradient_group)
            value /= self.ranks.gradient_size
        return value


def build_engine(
    plan: Plan, ranks: Ranks, pulse: Pulse | None = None, judge: Judge | None = None, *, draws_weights: bool = True
) -> Engine:
    """Build this rank's part of the model with its initial weights and hand it to DeepSpeed.

    Args:
        plan: layout and batch.
        ranks: this process's place.
        pulse: told of each phase of each micro-batch.
        judge: asked before each update whether its loss and norm are to be trusted.
        draws_weights: false: the initial weights are zeros, as others will take their place.

    Raises:
        ConfigError: this host cannot run what the configs ask for.
    """
    if plan.deepspeed.is_quantized and not torch.cuda.is_available():
        raise ConfigError(
            f"{plan.deepspeed.source}: zero_optimization.zero_quantized_weights and zero_quantized_gradients need CUDA "
            "kernels, but this host has no CUDA device; remove them here (the rest of ZeRO runs the same without)"
        )
    remarks = [
        choose_flash_attention(plan, ranks.device, ranks.gather_objects),
        fuse(plan, ranks.device, ranks.gather_objects),
        group_experts(plan, ranks.device, ranks.gather_objects),
    ]
    remark = "; ".join(filter(None, remarks)) or None
    swap_folder = prepare_swap_folder(plan, ranks) if plan.deepspeed.optimizer_is_on_disk else None
    try:
        module, optimizer, wrapped = _build(plan, ranks, swap_folder, draws_weights)
    except BaseException:
        if swap_folder is not None:
            swap_folder.remove()
        raise
    set_group_timeout(plan)
    return Engine(plan, ranks, module, optimizer, wrapped, pulse, judge, swap_folder, remark, not draws_weights)


def _build(
    plan: Plan, ranks: Ranks, swap_folder: SwapFolder | None, draws_weights: bool
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Model, optimizer and DeepSpeed's engine around them."""
    config = plan.engine_config()
    if swap_folder is not None:
        config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(swap_folder.path)
    is_pipeline = plan.pipeline_parallel_size > 1
    module: nn.Module
    if plan.is_cut_while_built:
        module = GPT(plan, lambda prefix, layer: finish_cut(prefix, layer, plan, ranks, draws_weights))
    else:
        module = pipeline_module(plan) if is_pipeline else GPT(plan)
        finish("", module, plan, ranks, draws_weights)
    optimizer = build_optimizer(named_parameters(module, plan, ranks.expert_rank), plan)
    wrapped, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=config,
        mpu=None if is_pipeline else ranks.mpu,
        dist_init_required=False,
    )
    skip_reduction_by_one_rank(wrapped)
    add_gradients_in_one_pass(wrapped.optimizer)
    share_fp32_weights(wrapped.optimizer)
    return module, optimizer, wrapped


def skip_reduction_by_one_rank(wrapped: Any) -> None:
    """Spare the sum of gradients over the data-parallel ranks if each of their groups is a single rank.

    DeepSpeed's bf16 optimizer would join all gradients in one tensor, sum it over the one rank and copy it back.
    """
    optimizer = wrapped.optimizer
    if isinstance(optimizer, BF16_Optimizer) and all(count == 1 for count in optimizer.partition_count):
        wrapped.enable_backward_allreduce = wrapped.pipeline_enable_backward_allreduce = False


def add_gradients_in_one_pass(optimizer: Any) -> None:
    """Add each gradient to its fp32 sum as it is, where DeepSpeed's bf16 optimizer would first make an fp32 copy: one
    more pass and kernel."""

    def accumulate(parameter: Any, group: int, index: int) -> None:
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        optimizer.fp32_groups_has_gradients[group][index] = True
        parameter._hp_grad, parameter.grad = total, None

    if isinstance(optimizer, BF16_Optimizer):
        optimizer.accumulate_hp_grads_and_remove_lp = accumulate
