"""The Plan: everything that follows from run config, DeepSpeed config and number of ranks, worked out once."""

import copy
from dataclasses import dataclass
from typing import Any

from megagpt.errors import ConfigError
from megagpt.plan.batch import Batch, resolve_batch
from megagpt.plan.config import ModelConfig, RunConfig
from megagpt.plan.deepspeed_config import DeepSpeedConfig, Precision
from megagpt.plan.estimates import (
    MemoryEstimate,
    hardware_flops_per_step,
    model_flops_per_step,
    model_state_bytes,
    stage_activation_bytes,
)
from megagpt.plan.layout import (
    count_active_parameters,
    count_parameters,
    padded_vocab_size,
    stage_bounds_of_run,
    stage_expert_parameters_per_rank,
    stage_parameters_per_rank,
    transformer_layers_of_stage,
)
from megagpt.plan.nearest import nearest_layout
from megagpt.plan.recompute import recomputed_layers
from megagpt.plan.rules import check_all
from megagpt.plan.zero import is_zero_plus_plus, swap_buffer_elements

NEVER = 1 << 60  # steps between DeepSpeed's own progress lines: ours replace them


@dataclass(frozen=True)
class Plan:
    """One training run, resolved and checked. Sizes that depend on the layout have their one home here."""

    run: RunConfig
    deepspeed: DeepSpeedConfig
    world_size: int
    """Ranks: tensor_parallel_size x context_parallel_size x data_parallel_size x pipeline_parallel_size."""
    tensor_parallel_size: int
    context_parallel_size: int
    """Ranks that share the positions of each sample."""
    pipeline_parallel_size: int
    data_parallel_size: int
    """Ranks that hold the same weights and positions, and see different samples."""
    expert_parallel_size: int
    """Data-parallel ranks that share the experts of a layer."""
    microbatch_size: int
    """Samples per micro-batch on one data-parallel rank (of each, a context-parallel rank holds a part)."""
    num_microbatches: int
    """Micro-batches per step (gradient accumulation)."""
    global_batch_size: int
    """Samples per step over all ranks."""
    precision: Precision
    """Type of the weights in forward and backward passes."""
    zero_stage: int
    """The ZeRO stage that is run (a requested stage 0 is run as 1)."""
    grad_accum_dtype: Precision
    """Type in which gradients are accumulated."""
    gradient_clipping: float
    """Largest norm of the gradients; 0.0 is off."""
    seq_length: int
    """Tokens per sample."""
    padded_vocab_size: int
    """Rows of the embedding table over all tensor-parallel ranks."""
    stage_bounds: tuple[int, ...]
    """Stage p holds the pipeline layers `stage_bounds[p] .. stage_bounds[p + 1] - 1` of the list
    [embedding, transformer layers, final norm, head]."""
    num_parameters: int
    """Parameters of the whole model, without padding."""
    num_active_parameters: int
    """Parameters that one token meets: fewer than all if it is sent to some of many experts."""
    flops_per_step: int
    """Model FLOPs of one step over all ranks (recomputation not counted)."""
    hardware_flops_per_step: int
    """FLOPs executed in one step over all ranks, recomputation included."""
    memory_per_stage: tuple[MemoryEstimate, ...]
    """Estimated bytes on one rank of each stage."""
    notes: tuple[str, ...]
    """What the user should know but need not mend."""

    @property
    def model(self) -> ModelConfig:
        """The architecture, with all defaults resolved."""
        return self.run.model

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step over all ranks."""
        return self.global_batch_size * self.seq_length

    @property
    def gradient_parallel_size(self) -> int:
        """Ranks over which gradients are averaged and ZeRO cuts its states: data x context parallel."""
        return self.data_parallel_size * self.context_parallel_size

    def sample_ranks(self, data_rank: int) -> list[int]:
        """Ranks of a data-parallel replica that need samples; the first one is its leader.

        Ranks are laid out with tensor parallel fastest, then context, data and pipeline parallel. Stages between the
        first and the last need samples for the documents in them only.
        """
        block = self.tensor_parallel_size * self.context_parallel_size
        stages = range(self.pipeline_parallel_size)
        if not self.run.data.marks_documents:
            stages = sorted({0, self.pipeline_parallel_size - 1})  # type: ignore[assignment]
        return [
            (stage * self.data_parallel_size + data_rank) * block + place for stage in stages for place in range(block)
        ]

    def reads_samples(self, rank: int) -> bool:
        """Whether a rank opens the datasets."""
        block = self.tensor_parallel_size * self.context_parallel_size
        data_rank = rank // block % self.data_parallel_size
        members = self.sample_ranks(data_rank)
        return rank == members[0] or (self.run.data.read_by == "all" and rank in members)

    @property
    def chunk_length(self) -> int:
        """Positions of each sample on one context-parallel rank."""
        return self.seq_length // self.context_parallel_size

    @property
    def pipeline_bubble(self) -> float:
        """Share of the time that a pipeline stage idles: (p - 1) / (m + p - 1) with p stages and m micro-batches (arXiv
        2104.04473, section 2.2.1)."""
        waiting = self.pipeline_parallel_size - 1
        return waiting / (self.num_microbatches + waiting)

    @property
    def memory(self) -> MemoryEstimate:
        """Estimated bytes on one rank of the stage that needs most."""
        return max(self.memory_per_stage, key=lambda estimate: estimate.total)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: fp32 weights and the optimizer's moments."""
        return self.num_parameters * 4 * (3 if self.run.optimizer.name == "adamw" else 1)

    @property
    def save_copy_bytes(self) -> int:
        """Host memory on a rank for the copy that is written while training goes on; ranks hold about equal parts."""
        config = self.run.checkpoint
        if config.directory is None or not config.asynchronous or self.deepspeed.optimizer_is_on_disk:
            return 0
        return -(-self.checkpoint_bytes // self.world_size)

    def transformer_layers_of_stage(self, stage: int) -> range:
        """Transformer layers of one pipeline stage, counted from 0 over the whole model."""
        return transformer_layers_of_stage(self.stage_bounds, stage)

    @property
    def is_cut_while_built(self) -> bool:
        """Whether ZeRO 3 cuts each layer before the next one is built. ZeRO++ cuts a model that is whole: its second
        cuts are made by the engine."""
        return self.zero_stage == 3 and not is_zero_plus_plus(self.deepspeed)

    def engine_config(self) -> dict[str, Any]:
        """What is handed to `deepspeed.initialize`: a copy of the JSON with everything resolved."""
        config = copy.deepcopy(self.deepspeed.raw)
        config |= {
            # To DeepSpeed context-parallel ranks are data-parallel ranks, each with samples of its own.
            "train_batch_size": self.global_batch_size * self.context_parallel_size,
            "train_micro_batch_size_per_gpu": self.microbatch_size,
            "gradient_accumulation_steps": self.num_microbatches,
            "gradient_clipping": self.gradient_clipping,
            "steps_per_print": NEVER,
        }
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self.zero_stage
        if (
            self.gradient_parallel_size == 1
            and self.zero_stage == 1
            and self.precision == "fp32"
            and not self.deepspeed.offloads_optimizer
        ):
            # No other rank to sum gradients with, so no need to collect them first: spares two copies of them all.
            zero.setdefault("contiguous_gradients", False)
            zero.setdefault("reduce_bucket_size", 1)
        config.setdefault("data_types", {})["grad_accum_dtype"] = self.grad_accum_dtype
        if self.precision == "bf16" and self.zero_stage == 1 and self.grad_accum_dtype == "fp32":
            # each bf16 gradient is added to the fp32 sum at once and freed, not kept until the step (2 bytes more)
            name = "bfloat16" if "bfloat16" in config else "bf16"  # both at once would contradict each other
            config.setdefault(name, {}).setdefault("immediate_grad_update", True)
        if self.deepspeed.offloads_optimizer:
            # torch's optimizer steps on the host too; DeepSpeed's own would be compiled first
            config["zero_force_ds_cpu_optimizer"] = False
        if self.run.optimizer.name == "sgd":
            # DeepSpeed lists the Adams it has tested under ZeRO; plain SGD is not among them
            config["zero_allow_untested_optimizer"] = True
        if self.run.parallel.sequence_parallel:
            # the defaults assume activations replicated over tensor-parallel ranks, which would be wrong here
            config.setdefault("pipeline", {}).update(pipe_partitioned=False, grad_partitioned=False)
        return config


def make_plan(run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int) -> Plan:
    """Check every rule and work out the Plan.

    Args:
        world_size: number of ranks, or the number that the plan is made for.

    Raises:
        ConfigError: one or more rules are broken; all of them are reported.
    """
    problems = check_all(run, deepspeed, world_size)
    if problems:
        raise ConfigError(problems, nearest_layout(run, deepspeed, world_size))
    tensor, pipeline = run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size
    context = run.parallel.context_parallel_size
    data = world_size // run.parallel.ranks_per_replica
    batch = resolve_batch(deepspeed, data)
    model, seq_length = run.model, run.training.seq_length
    zero_stage = max(deepspeed.zero_stage, 1)
    # 16-bit sums over many micro-batches lose small gradients, so fp32 unless the JSON asks otherwise
    grad_accum_dtype = deepspeed.grad_accum_dtype or "fp32"
    padded_vocab = padded_vocab_size(model.vocab_size, run.parallel.make_vocab_size_divisible_by, tensor)
    experts = run.parallel.expert_model_parallel_size
    bounds = stage_bounds_of_run(run)
    return Plan(
        run=run,
        deepspeed=deepspeed,
        world_size=world_size,
        tensor_parallel_size=tensor,
        context_parallel_size=context,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
        expert_parallel_size=experts,
        microbatch_size=batch.microbatch_size,
        num_microbatches=batch.num_microbatches,
        global_batch_size=batch.global_batch_size,
        precision=deepspeed.precision,
        zero_stage=zero_stage,
        grad_accum_dtype=grad_accum_dtype,
        gradient_clipping=deepspeed.gradient_clipping,
        seq_length=seq_length,
        padded_vocab_size=padded_vocab,
        stage_bounds=bounds,
        num_parameters=count_parameters(model),
        num_active_parameters=count_active_parameters(model),
        flops_per_step=model_flops_per_step(model, seq_length, batch.global_batch_size),
        hardware_flops_per_step=hardware_flops_per_step(
            model,
            seq_length,
            batch.global_batch_size,
            run.training,
            recomputed_layers(run.training, [len(transformer_layers_of_stage(bounds, p)) for p in range(pipeline)]),
        ),
        memory_per_stage=tuple(
            _estimate_memory(
                run, deepspeed, grad_accum_dtype, zero_stage, data * context, batch, padded_vocab, bounds, p
            )
            for p in range(pipeline)
        ),
        notes=tuple(_notes(run, deepspeed, batch)),
    )


def _estimate_memory(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    grad_accum_dtype: Precision,
    zero_stage: int,
    gradient_parallel_size: int,
    batch: Batch,
    padded_vocab: int,
    bounds: tuple[int, ...],
    stage: int,
) -> MemoryEstimate:
    """Estimate the bytes on one rank of one pipeline stage."""
    parallel = run.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    experts = parallel.expert_model_parallel_size
    expert_parameters = stage_expert_parameters_per_rank(run.model, bounds, stage, tensor, experts)
    parameters = stage_parameters_per_rank(run.model, bounds, stage, tensor, padded_vocab, experts)
    # ZeRO spreads the experts over the ranks that have the same ones.
    parts = (
        (parameters - expert_parameters, gradient_parallel_size),
        (expert_parameters, gradient_parallel_size // experts),
    )
    states = [
        model_state_bytes(
            count,
            deepspeed.precision,
            grad_accum_dtype,
            zero_stage,
            ranks,
            run.optimizer.name,
            deepspeed.offloads_optimizer,
            deepspeed.offloads_parameters,
            deepspeed.secondary_partition_size,
            swap_buffer_elements(deepspeed) if deepspeed.optimizer_is_on_disk else None,
        )
        for count, ranks in parts
    ]
    weights, gradients, optimizer, host, disk = (sum(sizes) for sizes in zip(*states, strict=True))
    activations = stage_activation_bytes(
        run.model,
        num_stage_layers=len(transformer_layers_of_stage(bounds, stage)),
        microbatches_in_flight=min(pipeline - stage, batch.num_microbatches),
        has_head=stage == pipeline - 1,
        padded_vocab_size=padded_vocab,
        seq_length=run.training.seq_length // parallel.context_parallel_size,
        microbatch_size=batch.microbatch_size,
        tensor_parallel_size=tensor,
        sequence_parallel=parallel.sequence_parallel,
        training=run.training,
        precision=deepspeed.precision,
    )
    return MemoryEstimate(stage, weights, gradients, optimizer, activations, host, disk)


def _notes(run: RunConfig, deepspeed: DeepSpeedConfig, batch: Batch) -> list[str]:
    notes = []
    if deepspeed.zero_stage == 0:
        notes.append(
            "ZeRO stage 0 runs as stage 1: DeepSpeed's stage 0 reports wrong gradient norms under tensor or pipeline "
            "parallelism and fails in 16 bit; the results are the same"
        )
    if deepspeed.zero_stage == 3 and is_zero_plus_plus(deepspeed):
        gib = 4 * count_parameters(run.model) / run.parallel.tensor_model_parallel_size / (1 << 30)
        notes.append(
            f"ZeRO++: each rank first builds its whole tensor-parallel part in fp32 ({gib:,.1f} GiB) and then "
            "splits it; that much must fit on a rank at the start"
        )
    if deepspeed.is_quantized:
        notes.append(
            "ZeRO++: bytes sent are told as if nothing were quantised; zero_quantized_weights and "
            "zero_quantized_gradients send fewer"
        )
    if deepspeed.optimizer_is_on_disk and run.checkpoint.directory and run.checkpoint.asynchronous:
        notes.append(
            "training waits for each save: checkpoint.asynchronous=true would first copy the state aside in memory, "
            "which need not have room for master weights and moments as they are on a disk"
        )
    stages, microbatches = run.parallel.pipeline_model_parallel_size, batch.num_microbatches
    if microbatches < stages:
        bubble = (stages - 1) / (microbatches + stages - 1)
        count = "1 micro-batch" if microbatches == 1 else f"{microbatches} micro-batches"
        notes.append(
            f"{count} for {stages} pipeline stages: each stage idles {bubble:.0%} of the time "
            "((p-1)/(m+p-1)); a larger train_batch_size or a smaller micro-batch shrinks the bubble"
        )
    training = run.training
    fused = not run.model.attention_dropout and run.model.attn_logit_softcapping is None
    if training.recompute_granularity == "selective" and fused:
        notes.append(
            "training.recompute_granularity=selective saves next to nothing where attention runs in a fused kernel, "
            "which keeps no sequence x sequence matrix; full saves most"
        )
    if run.model.attention_dropout > 0 or run.model.hidden_dropout > 0:
        notes.append("dropout is on: results depend on the layout through the random numbers of each rank")
    return notes
