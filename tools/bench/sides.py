"""One side of the training benchmark in a process of its own; `train_step.py` starts it and tells it when to run.

It answers each line `N` on standard input with a JSON line about N optimizer steps, and ends with the input.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workload import BETAS, CLIPPING, EPSILON, LEARNING_RATE, SIZES, WEIGHT_DECAY, Size, token_batch

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


class Conversation:
    """The lines exchanged with the benchmark: requests on standard input, answers on the original standard output."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes elsewhere

    def requests(self) -> Iterator[int]:
        """Numbers of steps to run, until the input ends."""
        for line in sys.stdin:
            yield int(line)

    def answer(self, **values: Any) -> None:
        """Write one JSON line."""
        print(json.dumps(values), file=self._answers, flush=True)


def synchronise() -> None:
    """Wait for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Peak memory of this process: device memory on a GPU, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Seconds of wall clock and of this process's CPU time (user and system, all threads) since it was made."""

    def __init__(self) -> None:
        synchronise()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def figures(self) -> dict[str, float]:
        """What one answer tells, by name."""
        synchronise()
        return {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": time.process_time() - self._cpu_started,
            "peak_bytes": peak_bytes(),
        }


def serve(talk: Conversation, step: Callable[[int], Any]) -> None:
    """Run `step(index)` as often as asked and answer with the time that it took, until the input ends.

    Args:
        talk: where requests come from.
        step: does the optimizer step of that index.
    """
    index = 0
    for count in talk.requests():
        watch = Stopwatch()
        for _ in range(count):
            step(index)
            index += 1
        talk.answer(**watch.figures())


def run_megagpt(talk: Conversation, size_name: str, precision: str, sequential: bool = False) -> None:
    """Our engine as `megagpt.train` starts it: one rank, the shipped ZeRO-1 config.

    Args:
        talk: the benchmark.
        size_name: key of `workload.SIZES`.
        precision: fp32 or bf16.
        sequential: compute experts one after the other on GPUs too.
    """
    from megagpt.parallel.console import muted, quiet_libraries
    from megagpt.parallel.launch import Launch, detect_launch, free_port
    from megagpt.plan import deepspeed_config_from_dict, make_plan, run_config_from_dict

    os.environ.setdefault("MASTER_PORT", str(free_port()))
    launch: Launch = detect_launch()
    quiet_libraries(verbose=False)
    with muted(verbose=False):
        from megagpt.parallel.ranks import start_ranks, stop_ranks

        size = SIZES[size_name]
        deepspeed = json.loads((DS_CONFIGS / f"zero1_{precision}.json").read_text())
        deepspeed |= {
            "train_micro_batch_size_per_gpu": size.microbatch_size,
            "train_batch_size": size.microbatch_size * size.num_microbatches,
            "gradient_clipping": CLIPPING,
        }
        plan = make_plan(run_config_from_dict(run_tree(size, sequential)), deepspeed_config_from_dict(deepspeed), 1)
        ranks = start_ranks(plan, launch)
        from megagpt.engine import build_engine

        engine = build_engine(plan, ranks)

    def step(index: int) -> Any:
        tokens = (token_batch(size, index, m) for m in range(size.num_microbatches))
        pairs = ((t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens)
        return engine.train_step(pairs, LEARNING_RATE).loss

    talk.answer(ready=sum(p.numel() for p in engine.parameters.values()))
    serve(talk, step)
    stop_ranks()


def run_tree(size: Size, sequential: bool = False) -> dict[str, dict[str, Any]]:
    """The run config of a size; `sequential` as in `run_megagpt`."""
    experts = {
        "num_experts": size.num_experts,
        "moe_router_topk": size.num_chosen,
        "moe_ffn_hidden_size": size.ffn_hidden_size,
        "moe_aux_loss_coeff": 0.0,
    }
    return {
        "model": {
            "num_layers": size.num_layers,
            "hidden_size": size.hidden_size,
            "num_attention_heads": size.num_heads,
            "ffn_hidden_size": size.ffn_hidden_size,
            "vocab_size": size.vocab_size,
            "max_position_embeddings": size.seq_length,
            **(experts if size.num_experts else {}),
        },
        "optimizer": {
            "lr": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPSILON,
        },
        "training": {"steps": 1 << 20, "moe_grouped_gemm": not sequential},
    }


def transformers_model(size: Size) -> Any:
    """The same model in transformers, with SDPA and without the cache that only generation needs."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    options: dict[str, Any] = {
        "num_hidden_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
        "intermediate_size": size.ffn_hidden_size,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.seq_length,
        "rms_norm_eps": 1e-5,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if not size.num_experts:
        return LlamaForCausalLM(LlamaConfig(**options))
    experts = {"num_local_experts": size.num_experts, "num_experts_per_tok": size.num_chosen}
    return MixtralForCausalLM(MixtralConfig(**options, **experts))


def run_torch(talk: Conversation, size_name: str, precision: str, pure: bool = False) -> None:
    """The loop that one writes with torch and transformers: autocast over fp32 weights for bf16.

    Args:
        talk: the benchmark.
        size_name: key of `workload.SIZES`.
        precision: fp32 or bf16.
        pure: keep weights and moments in bf16 too, which trains worse.
    """
    import torch

    size = SIZES[size_name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers_model(size).to(device, torch.bfloat16 if pure else torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16" and not pure)

    def step(index: int) -> Any:
        total = torch.zeros((), device=device)
        for microbatch in range(size.num_microbatches):
            tokens = token_batch(size, index, microbatch)[:, :-1].to(device)
            with autocast:
                loss = model(input_ids=tokens, labels=tokens).loss / size.num_microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    talk.answer(ready=model.num_parameters())
    serve(talk, step)


def run_trainer(talk: Conversation, size_name: str, precision: str) -> None:
    """Hugging Face's Trainer with its defaults; a callback makes it wait for the benchmark between steps."""
    import torch
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    size = SIZES[size_name]

    class Sequences(Dataset):
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
            batch, row = divmod(sample, size.microbatch_size)
            tokens = token_batch(size, *divmod(batch, size.num_microbatches))[row, :-1]
            return {"input_ids": tokens, "labels": tokens}

    class Pace(TrainerCallback):
        requests = talk.requests()
        left = 0
        watch: Stopwatch | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.left == 0:
                if self.watch is not None:
                    talk.answer(**self.watch.figures())
                self.left = next(self.requests, 0)
                if self.left == 0:  # the benchmark has ended
                    sys.exit(0)
                self.watch = Stopwatch()
            self.left -= 1

    model = transformers_model(size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.microbatch_size,
            gradient_accumulation_steps=size.num_microbatches,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPSILON,
            max_grad_norm=CLIPPING,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            max_steps=1 << 20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        talk.answer(ready=model.num_parameters())
        Trainer(model=model, args=arguments, train_dataset=Sequences(), callbacks=[Pace()]).train()


def main() -> None:
    """Become one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("megagpt", "megagpt-sequential", "torch", "torch-pure", "trainer"))
    parser.add_argument("size")
    parser.add_argument("precision", choices=("fp32", "bf16"))
    args = parser.parse_args()
    talk = Conversation()
    if args.side.startswith("megagpt"):
        run_megagpt(talk, args.size, args.precision, sequential=args.side == "megagpt-sequential")
    elif args.side == "trainer":
        run_trainer(talk, args.size, args.precision)
    else:
        run_torch(talk, args.size, args.precision, pure=args.side == "torch-pure")


if __name__ == "__main__":
    main()
