"""Train a GPT: `deepspeed --module megagpt.train --config run.yaml --deepspeed_config ds.json [key=value ...]`.

Also started by torchrun, srun, mpirun or plain python; the ranks are found out from the launcher's variables.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import MegagptError, run_command
from megagpt.parallel.console import Console, quiet_libraries
from megagpt.parallel.launch import Launch, detect_launch
from megagpt.plan import Plan, load_deepspeed_config, load_run_config, make_plan
from megagpt.signals import StopSignal

if TYPE_CHECKING:
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.data.samples import SampleStream
    from megagpt.engine import Engine
    from megagpt.metrics import Meter
    from megagpt.parallel.ranks import Ranks


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="megagpt.train", description="Train a GPT with Megatron-Core and DeepSpeed.")
    parser.add_argument("--config", required=True, help="run config (YAML)")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed config (JSON)")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' warnings and log lines")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher, not needed
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
    return parser.parse_args(arguments)


def main() -> int:
    """Plan first, then everything that costs time."""
    args = parse_arguments()
    stop = StopSignal()
    launch = detect_launch()
    quiet_libraries(args.verbose)
    try:
        plan = make_plan(
            load_run_config(args.config, args.overrides), load_deepspeed_config(args.deepspeed_config), launch.world_size
        )
        return run(plan, launch, stop, args.verbose)
    except MegagptError as error:
        if launch.local_rank != 0:  # one message per host
            return error.exit_code
        raise


def run(plan: Plan, launch: Launch, stop: StopSignal, verbose: bool = False) -> int:
    """Train one run to its end, to a signal or to an error.

    Raises:
        DataError: dataset or tokenizer are missing, damaged or do not fit the model.
        CheckpointError: a checkpoint cannot be written, or belongs to another model.
    """
    from megagpt.checkpoint import finished_step

    console = Console(launch.rank, verbose)
    directory = plan.run.checkpoint.directory
    done = finished_step(Path(directory)) if directory else None
    if done is not None and done >= plan.run.training.steps:
        console.say(f"{directory} already holds step {done} of {plan.run.training.steps}: the run is finished, nothing to do")
        return 0
    from megagpt.data.loader import open_dataset

    model, training = plan.model, plan.run.training
    streams = open_dataset(plan.run.data, model.vocab_size, plan.seq_length, training.seed)
    with console.muted():
        from megagpt.parallel.ranks import start_ranks, stop_ranks

        ranks = start_ranks(plan, launch)
        from megagpt.checkpoint import Checkpoints
        from megagpt.engine import build_engine

        engine = build_engine(plan, ranks)
    console.say(headline(plan, launch))
    checkpoints = Checkpoints(plan, engine, ranks, console)
    train(plan, ranks, engine, checkpoints, streams, console, stop)
    stop_ranks()
    return 0


def headline(plan: Plan, launch: Launch) -> str:
    """The run in two lines."""
    layout = f"TP {plan.tensor_parallel_size} x PP {plan.pipeline_parallel_size} x DP {plan.data_parallel_size}"
    return (
        f"{plan.num_parameters:,} parameters, {plan.precision}, {layout}, ZeRO {plan.zero_stage}, started by {launch.launcher}\n"
        f"{plan.run.training.steps:,} steps of {plan.global_batch_size} x {plan.seq_length} = {plan.tokens_per_step:,} tokens"
    )


def train(
    plan: Plan,
    ranks: "Ranks",
    engine: "Engine",
    checkpoints: "Checkpoints",
    streams: "dict[str, SampleStream | None]",
    console: Console,
    stop: StopSignal,
) -> "TrainState":
    """The loop: update, report, evaluate, save."""
    from megagpt.checkpoint import TrainState
    from megagpt.data.loader import train_batches
    from megagpt.metrics import Meter
    from megagpt.optim import learning_rate

    run, total_steps = plan.run, plan.run.training.steps
    restored = checkpoints.restore_latest()
    state = restored or TrainState()
    meter = Meter(plan, console, first_step=state.step)
    evaluate_split = _evaluator(plan, ranks, engine, streams, meter)
    assert streams["train"] is not None
    batches = train_batches(
        streams["train"],
        first_sample=state.samples,
        global_batch_size=plan.global_batch_size,
        microbatch_size=plan.microbatch_size,
        data_parallel_rank=ranks.data_rank,
        data_parallel_size=ranks.data_size,
    )
    if restored is None:
        evaluate_split("validation", state.step)
    while state.step < total_steps:
        rate = learning_rate(state.step, plan)
        result = engine.train_step(batches, rate)
        state = state.advance(samples=plan.global_batch_size)
        meter.record(state.step, rate, result.loss, result.grad_norm)
        is_last = state.step == total_steps
        reports = is_last or due(state.step, run.logging.interval)
        if reports:
            meter.report()
        if is_last or due(state.step, run.training.eval_interval):
            evaluate_split("validation", state.step)
        stopping = reports and not is_last and stop.agreed_by(ranks)
        if is_last:
            evaluate_split("test", state.step)
        if stopping or is_last or due(state.step, run.checkpoint.save_interval):
            _save(checkpoints, state, meter)
        if stopping:
            meter.say(f"stopped by a signal after step {state.step}; the same command goes on from here")
            break
    meter.close()
    return state


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens now; an interval of 0 means never."""
    return interval > 0 and step % interval == 0


def _evaluator(
    plan: Plan, ranks: "Ranks", engine: "Engine", streams: "dict[str, SampleStream | None]", meter: "Meter"
) -> Callable[[str, int], None]:
    from megagpt.evaluate import evaluate

    def evaluate_split(split: str, step: int) -> None:
        stream = streams[split]
        if stream is None:
            return
        started = time.monotonic()
        loss = evaluate(engine, stream, plan, ranks, plan.run.training.eval_batches)
        meter.report_eval(split, loss, step)
        meter.pause(time.monotonic() - started)

    return evaluate_split


def _save(checkpoints: "Checkpoints", state: "TrainState", meter: "Meter") -> None:
    started = time.monotonic()
    folder = checkpoints.save(state, meter.latest)
    seconds = time.monotonic() - started
    if folder is not None:
        meter.say(f"step {state.step:>7,}  saved {folder} in {seconds:.1f} s")
    meter.pause(seconds)


if __name__ == "__main__":
    run_command(main)
