"""The run config: what one YAML file says about a training run.

Batch sizes, precision, ZeRO, offload and gradient clipping have their home in the DeepSpeed JSON and are not repeated
here. Rules that span sections or files live in `rules.py`; here each value is checked by itself.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from megagpt.plan.data_config import DataConfig
from megagpt.plan.section import NonNegative, Positive, Probability, Section, is_count, without_nulls
from megagpt.storage import RemotePath, location

PipelinePartition = Literal["uniform", "parameters"] | Annotated[tuple[NonNegative, ...], Strict(False)]


class RotaryScaling(Section):
    """How rotary frequencies are stretched for sequences longer than those of an earlier training."""

    type: Literal["linear", "llama3"]
    """`linear` divides all frequencies by `factor` (Chen et al. 2023, arXiv 2306.15595); `llama3` only the low ones
    (Llama 3.1 and later)."""
    factor: Annotated[float, Field(ge=1)]
    """By how much longer sequences may be."""
    low_freq_factor: Annotated[float, Field(gt=0)] | None = None
    """llama3: frequencies with fewer turns than this in the original length are divided by `factor`; default: 1."""
    high_freq_factor: Annotated[float, Field(gt=0)] | None = None
    """llama3: frequencies with more turns than this in the original length stay; default: 4."""
    original_max_position_embeddings: Positive | None = None
    """llama3: longest sequence of the earlier training; default: 8192."""

    @model_validator(mode="before")
    @classmethod
    def fill_derived(cls, values: Any) -> Any:
        """Fill in the values of Llama 3.1."""
        if not isinstance(values, dict):
            return values
        values = without_nulls(values)
        if values.get("type") == "llama3":
            published = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            values = published | values
        return values


class ModelConfig(Section):
    """Architecture. Names follow Megatron-Core's TransformerConfig where it has one."""

    preset: str | None = None
    """Name of a shipped model (`megagpt/presets/NAME.yaml`) or path of a YAML file whose keys fill this section;
    keys given beside it win."""
    init_from: str | None = None
    """Folder of a Hugging Face model (safetensors and config.json) whose weights a new run starts from, on any layout;
    keys of this section that are not given are read from its config.json."""
    num_layers: Positive
    """Number of transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_attention_heads: Positive
    """Number of query heads."""
    num_query_groups: Positive
    """Number of key/value heads (grouped-query attention); default: num_attention_heads."""
    kv_channels: Positive
    """Size of one head; default: hidden_size / num_attention_heads."""
    ffn_hidden_size: Positive
    """Inner width of the MLP; default: 4 x hidden_size (for gated activations set it: it counts one branch)."""
    vocab_size: Positive
    """Number of tokens of the tokenizer; padded internally, the padding is never seen outside."""
    max_position_embeddings: Positive
    """Longest sequence; the size of the table for learned positions."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """Rotary (RoPE) or learned absolute positions."""
    rotary_base: Annotated[float, Field(gt=0)] = 10000.0
    """Base (theta) of the rotary frequencies."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head's channels that is rotated."""
    rotary_scaling: RotaryScaling | None = None
    """Stretching of the rotary frequencies, a section of its own; null: none."""
    sliding_window: Positive | None = None
    """Each position attends to itself and the `sliding_window - 1` positions before it (Mistral); null: to all before
    it."""
    window_attn_skip_freq: Annotated[int, Field(ge=2)] | None = None
    """Every so many layers one attends to all positions instead of the window: 2 in Gemma 2, 6 in Gemma 3; null: none
    does."""
    rotary_base_local: Annotated[float, Field(gt=0)] | None = None
    """Base of the rotary frequencies, not stretched, in layers with a window (Gemma 3); null: as in all others."""
    qk_layernorm: bool = False
    """Normalise each head's query and key before they are rotated (Qwen3, Gemma 3)."""
    query_pre_attn_scalar: Positive | None = None
    """Attention scores are divided by its square root (Gemma 2 and 3); null: kv_channels."""
    attn_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    """Attention scores are bent to stay below this: c tanh(score / c) (Gemma 2); null: left as they are."""
    final_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    """The same for the logits (Gemma 2)."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of normalisation."""
    layernorm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon inside the normalisation."""
    layernorm_zero_centered_gamma: bool = False
    """Norms multiply by 1 + weight instead of weight (Gemma)."""
    post_layernorms: bool = False
    """Also normalise what attention and MLP give before it is added to the residual stream (Gemma 2 and 3)."""
    scale_embedding: bool = False
    """Multiply word embeddings by the square root of hidden_size (Gemma)."""
    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """Activation of the MLP; `swiglu`, `geglu` and `geglu_tanh` are gated; `tanh` is GPT-2's and Gemma's approximation
    of GELU."""
    add_bias_linear: bool = False
    """Biases in all linear layers of attention and MLP."""
    add_qkv_bias: bool = False
    """Bias in the query/key/value projection only (implied by add_bias_linear)."""
    untie_embeddings_and_output_weights: bool = True
    """Separate output projection (true) or the word embedding used twice (false)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (GPT-NeoX)."""
    hidden_dropout: Probability = 0.0
    """Dropout after embedding, attention and MLP."""
    attention_dropout: Probability = 0.0
    """Dropout of the attention probabilities."""
    init_method_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; output projections are scaled by 1 / sqrt(2 num_layers)."""
    num_experts: Positive | None = None
    """Experts per mixture-of-experts layer; null: a dense model."""
    moe_router_topk: Positive = 2
    """Experts that each token is sent to; none is ever dropped."""
    moe_ffn_hidden_size: Positive
    """Inner width of one expert; default: ffn_hidden_size, which is then used by dense layers only."""
    moe_layer_freq: Positive | Annotated[tuple[Literal[0, 1], ...], Strict(False)] = 1
    """Layers with experts: every n-th from the first on, or a list with 1 (experts) or 0 (dense) per layer."""
    moe_shared_expert_intermediate_size: Positive | None = None
    """Inner width of the expert that sees every token besides those chosen; null: there is none."""
    moe_shared_expert_gate: bool = False
    """Weigh the shared expert's output by a learned sigmoid gate."""
    moe_router_pre_softmax: bool = False
    """Weights of the chosen experts: softmax over all experts (true), or over the chosen ones, which then sum to 1."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss (arXiv 2101.03961, eq. 4); not part of the reported loss."""
    moe_z_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the router's z-loss (arXiv 2202.08906, eq. 5), which keeps its logits small."""

    @model_validator(mode="before")
    @classmethod
    def fill_derived(cls, values: Any) -> Any:
        """Fill in the sizes that follow from others, so that later code never meets a gap.

        A size that cannot be derived (its sources are missing, malformed or do not divide) stays missing; the loader
        words the error.
        """
        if not isinstance(values, dict):
            return values
        values = without_nulls(values)
        heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
        if is_count(heads):
            values.setdefault("num_query_groups", heads)
        if is_count(heads) and is_count(hidden) and hidden % heads == 0:
            values.setdefault("kv_channels", hidden // heads)
        if is_count(hidden):
            values.setdefault("ffn_hidden_size", 4 * hidden)
        if is_count(values.get("ffn_hidden_size")):
            values.setdefault("moe_ffn_hidden_size", values["ffn_hidden_size"])
        return values

    @property
    def is_gated(self) -> bool:
        """Whether the MLP's first projection has two branches, one gating the other."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query/key/value projection has a bias."""
        return self.add_qkv_bias or self.add_bias_linear

    def window_of_layer(self, index: int) -> int | None:
        """The sliding window of layer `index` (0 ... num_layers - 1); None: it attends to all positions."""
        skips = self.window_attn_skip_freq is not None and (index + 1) % self.window_attn_skip_freq == 0
        return None if skips else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        """Whether a transformer layer, counted from 0, has experts in place of one MLP."""
        if self.num_experts is None:
            return False
        if isinstance(self.moe_layer_freq, tuple):
            return bool(self.moe_layer_freq[layer])
        return layer % self.moe_layer_freq == 0


class ParallelConfig(Section):
    """How the model is spread over ranks; the data-parallel size follows from the world size."""

    tensor_model_parallel_size: Positive = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: Positive = 1
    """Pipeline stages (PP)."""
    pipeline_partition: PipelinePartition = "uniform"
    """Transformer layers per stage: `uniform` (as evenly as possible), `parameters` (the largest stage is as small as
    it can be, embedding and head weighed in) or a list of their numbers such as [7, 8, 8, 7]."""
    context_parallel_size: Positive = 1
    """Ranks that share each sample (CP, for long sequences): each holds a part of the positions, and the heads of
    attention are exchanged by all-to-all (Ulysses); divides query heads / tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Split norms and dropouts along the sequence over the tensor-parallel ranks."""
    expert_model_parallel_size: Positive = 1
    """Data-parallel ranks (context-parallel ones too) that share the experts of a layer (EP); divides their number and
    model.num_experts."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts: each rank gets its experts' tokens, or all tokens of the TP x EP ranks."""
    make_vocab_size_divisible_by: Positive = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that share the samples of one data-parallel rank: TP x CP x PP."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule (linear warm-up, then cosine down to min_lr)."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain SGD (for tests of exactness: Adam hides errors in the scale of gradients)."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 3e-5
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from zero."""
    decay_steps: Positive
    """Step at which min_lr is reached; default: training.steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: Probability = 0.9
    """AdamW's first moment decay."""
    beta2: Probability = 0.95
    """AdamW's second moment decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""


class TrainingConfig(Section):
    """Length of the run and what is computed besides steps."""

    steps: Positive
    """Number of optimizer steps of the whole run."""
    seq_length: Positive
    """Tokens per sample; default: model.max_position_embeddings."""
    seed: NonNegative = 1234
    """Seed of weights, dropout and sample order."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: `none` keeps all activations; `full` keeps the inputs of transformer layers only and
    recomputes the layers in the backward pass; `selective` recomputes the attention core only, which pays off where
    torch has no fused kernel for it (a fused one keeps no sequence x sequence matrix anyway)."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers `full` recomputes: `uniform` makes segments of recompute_num_layers layers of a pipeline stage and
    keeps one input per segment; `block` recomputes the first recompute_num_layers layers of each stage one by one and
    keeps the activations of the others."""
    recompute_num_layers: Positive = 1
    """Layers per segment (uniform) or recomputed layers per stage (block)."""
    distribute_saved_activations: bool = False
    """With `full`: split each kept input over the tensor-parallel ranks, all-gather it in the backward pass; without
    sequence_parallel, under which it is split already."""
    offload_saved_activations: bool = False
    """With `full`: keep the inputs in (pinned) host memory."""
    flash_attention: Literal["auto", "torch", "FA3", "FA4"] = "auto"
    """Kernel of attention on GPUs, in 16 bits: `torch` is the FlashAttention that torch brings; `FA3` (package
    flash_attn_interface, for Hopper) and `FA4` (flash-attn-4, for Hopper and Blackwell) have to show when the run
    starts that they compute the same; `auto` uses one that is installed and does so. Elsewhere it says nothing."""
    compile: bool = True
    """On GPUs: elementwise functions (rotary positions, gated activations, cross-entropy) become single kernels by
    torch.compile, which takes some seconds of the first step."""
    deterministic: bool = False
    """On GPUs: only kernels that add up in a fixed order, so that the same run gives the same numbers, to the last bit;
    long attention's backward pass takes longer so, and an operation that has no such kernel ends the run. On CPUs this
    is so anyway."""
    moe_grouped_gemm: bool = True
    """On GPUs of compute capability 9 or 10, in bf16, under ZeRO 1 and 2: experts are computed all at once by
    torch's grouped_mm, which has to show when the run starts that it is right. Elsewhere it says nothing."""
    eval_interval: NonNegative = 0
    """Steps between evaluations on the validation split; 0 evaluates at the end only."""
    eval_batches: Positive = 8
    """Global batches per evaluation."""


class CheckpointConfig(Section):
    """Where and when the state is saved."""

    directory: str | None = None
    """Folder of the checkpoints, or the URL of one in an object store (s3://BUCKET/FOLDER, and what else fsspec
    knows); the run resumes from the newest one there. None: nothing is saved."""
    save_interval: NonNegative = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: Positive = 2
    """Number of newest checkpoints kept."""
    keep_every: NonNegative = 0
    """Also keep each checkpoint whose step is a multiple of this, for ever; 0: none."""
    keep_best: NonNegative = 1
    """Also keep so many checkpoints with the lowest validation loss, of those that were evaluated at the step at which
    they were saved. A file named `pinned` in a checkpoint's folder keeps that one, too."""
    asynchronous: bool = True
    """Copy the state aside (in host memory: 12 bytes for each parameter whose optimizer state a rank holds) and write
    it while training goes on; false: training waits until it is written."""
    allow_changes: Annotated[tuple[Literal["model", "dataset", "tokenizer", "seed"], ...], Strict(False)] = ()
    """What may differ from the run that wrote the checkpoint to resume from; everything else is refused. `model` allows
    what leaves all weights their shapes; `dataset` also covers data.split and training.seq_length."""


class LoggingConfig(Section):
    """What is reported, and where."""

    interval: Positive = 10
    """Steps between progress reports; the only moments at which the host waits for the device."""
    directory: str | None = None
    """Folder for metrics.jsonl and TensorBoard files, and for what the ranks tell each other of their progress; None:
    progress lines only, and the latter beside the checkpoints."""


PATIENCE_WITH_SLOW_PHASES = 6.0
"""How many times `hang_seconds` loading and saving may take."""


class SupervisionConfig(Section):
    """How a run that nobody watches is stopped in time, kept from harm and ended when it is stuck."""

    stop_after_minutes: Annotated[float, Field(gt=0)] | None = None
    """Save and stop in time to have left this long after the start; Slurm's own time limit is known without."""
    hang_seconds: Annotated[float, Field(ge=0)] = 600.0
    """End the job, with the stacks of all ranks and who waits for whom, once no rank has gone on for so long (six times
    as long while loading or saving); 0: never."""
    silent_seconds: Annotated[float, Field(gt=0)] = 30.0
    """End the job once a rank's process is frozen, or its host is lost, for so long, and the others wait for it."""
    max_bad_steps: NonNegative = 3
    """A step whose loss or gradient is no number, or a spike, is computed again, and if it stays so its update is
    skipped; after so many in a row the run goes back to its last checkpoint and skips the samples from there on. 0:
    the run ends at the first one that is no number, and what follows here is not done either."""
    spike_threshold: Annotated[float, Field(ge=0)] = 10.0
    """A loss so many robust standard deviations (of the last 128 steps) above their median, and 10 % above it, is a
    spike; 0: only nan and inf count."""
    replica_check_interval: NonNegative = 500
    """Every so many steps the weights that data-parallel ranks have in common are compared bit by bit; 0: never."""
    recompute_interval: NonNegative = 1000
    """Every so many steps a step is computed twice and its figures are compared; 0: never."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    @property
    def shared_folder(self) -> str | None:
        """A folder that all ranks see, if there is one: of the logs, else of the checkpoints."""
        checkpoints = self.checkpoint.directory
        remote = checkpoints is not None and isinstance(location(checkpoints), RemotePath)
        return self.logging.directory or (None if remote else checkpoints)

    @model_validator(mode="before")
    @classmethod
    def fill_derived(cls, values: Any) -> Any:
        """Fill in the defaults that come from another section: training.seq_length and optimizer.decay_steps."""
        if not isinstance(values, dict):
            return values
        sections = {name: section for name, section in values.items() if section is not None}
        sections.setdefault("optimizer", {})
        for name, section in sections.items():
            if isinstance(section, dict):
                sections[name] = without_nulls(section)
        model, training, optimizer = (sections.get(name) for name in ("model", "training", "optimizer"))
        if isinstance(training, dict) and isinstance(model, dict) and "max_position_embeddings" in model:
            training.setdefault("seq_length", model["max_position_embeddings"])
        if isinstance(optimizer, dict) and isinstance(training, dict) and "steps" in training:
            optimizer.setdefault("decay_steps", training["steps"])
        return sections
