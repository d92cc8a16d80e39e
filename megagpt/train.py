"""Train a GPT: `deepspeed --module megagpt.train --config run.yaml --deepspeed_config ds.json [key=value ...]`.

Also started by torchrun, srun, mpirun or plain python; the ranks are found out from the launcher's variables.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from megagpt.errors import CheckpointError, LaunchError, MegagptError, RankError, run_command
from megagpt.launchers import spans_hosts
from megagpt.parallel.console import Console, quiet_libraries
from megagpt.parallel.deepspeed_launcher import find_launch
from megagpt.parallel.launch import Launch
from megagpt.parallel.open_files import raise_limit
from megagpt.plan import Plan, load_deepspeed_config, load_run_config, make_plan
from megagpt.prerequisites import own_errors, require_intact_data, require_writable_folders
from megagpt.signals import StopSignal
from megagpt.supervise.deadline import Deadline, end_of_job
from megagpt.supervise.pulse import Phase
from megagpt.supervise.stopping import Stopping

if TYPE_CHECKING:
    from megagpt.checkpoint import Checkpoints, TrainState
    from megagpt.checkpoint.background import Saved
    from megagpt.data.run_data import RunData
    from megagpt.data.supply import Supply
    from megagpt.engine import Engine
    from megagpt.metrics import Meter
    from megagpt.parallel.ranks import Ranks


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="megagpt.train", description="Train a GPT with Megatron-Core and DeepSpeed.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="run config (YAML)")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed config (JSON)")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' warnings and log lines")
    # Given by the deepspeed launcher and by habit; neither is needed.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run config")
    return parser.parse_intermixed_args(arguments)  # overrides may stand anywhere


def main() -> int:
    """Plan first, then everything that costs time."""
    stop = StopSignal()
    args = parse_arguments()
    launch = find_launch()
    quiet_libraries(args.verbose)
    raise_limit()
    try:
        run_config = load_run_config(args.config, args.overrides)
        plan = make_plan(run_config, load_deepspeed_config(args.deepspeed_config), launch.world_size)
        return run(plan, launch, stop, args.verbose)
    except (RankError, LaunchError):
        raise
    except MegagptError as error:
        if launch.local_rank != 0:  # all ranks have it; one message per host
            return error.exit_code
        raise


def run(plan: Plan, launch: Launch, stop: StopSignal, verbose: bool = False) -> int:
    """Train one run to its end, to a signal or to an error.

    Returns:
        Exit status: 0.

    Raises:
        ConfigError: a folder of the run config cannot be written to.
        DataError: dataset or tokenizer are missing, damaged or do not fit the model.
        CheckpointError: a checkpoint cannot be written, or belongs to another model.
        TrainingError: the loss is not finite.
        RankError: this rank alone has failed, or another one has ended.
    """
    from megagpt.checkpoint import finished_step, weights_will_be_replaced

    console = Console(launch.rank, verbose)
    with own_errors(launch):
        done = finished_step(plan)
        replaced = launch.rank == 0 and weights_will_be_replaced(plan)
    if done is not None:
        console.say(
            f"{plan.run.checkpoint.directory} already holds step {done:,} and training.steps="
            f"{plan.run.training.steps:,}: the run is finished, nothing to do; to go on, raise training.steps"
        )
        return 0
    from megagpt.data.fingerprint import fingerprints
    from megagpt.data.run_data import open_data

    model, training = plan.model, plan.run.training
    opened, hashes, problem = None, {}, None
    try:
        with own_errors(launch):
            if plan.reads_samples(launch.rank):
                opened = open_data(plan.run.data, model.vocab_size, plan.seq_length, training.seed)
            hashes = fingerprints(plan.run.data) if launch.rank == 0 else {}
    except RankError as error:
        if launch.launcher != "srun" and not spans_hosts():
            raise  # the launcher ends the others, and has this one's exit status
        problem = error
    with console.muted():
        from megagpt.parallel.ranks import set_group_timeout, start_ranks, stop_ranks
        from megagpt.supervise.absence import noting_absence

        with noting_absence(plan):
            ranks = start_ranks(plan, launch, problem)
        require_writable_folders(plan, ranks)
        require_intact_data(plan, ranks, launch)
        described = ranks.broadcast_object(opened.described() if opened is not None and ranks.rank == 0 else None)
        data = described if opened is None else opened
        from megagpt.checkpoint import Checkpoints
        from megagpt.engine import build_engine
        from megagpt.supervise.careful import judge_of
        from megagpt.supervise.watch import watch

        set_group_timeout(plan)
    with watch(plan, ranks) as pulse:
        with console.muted():
            replaced = ranks.broadcast_object(replaced)
            engine = build_engine(plan, ranks, pulse, judge_of(plan), draws_weights=not replaced)
        with contextlib.closing(engine):
            console.say(headline(plan, launch))
            for note in [*plan.notes, *filter(None, [engine.remark])]:
                console.say(f"note: {note}")
            for remark in remarks(plan, data):
                console.warn(remark)
            checkpoints = Checkpoints(plan, engine, ranks, console, ranks.broadcast_object(hashes))
            train(plan, ranks, engine, checkpoints, data, console, stop)
    stop_ranks()
    return 0


def headline(plan: Plan, launch: Launch) -> str:
    """The run in two lines."""
    context = f"CP {plan.context_parallel_size} x " if plan.context_parallel_size > 1 else ""
    layout = (
        f"TP {plan.tensor_parallel_size} x {context}PP {plan.pipeline_parallel_size} x DP {plan.data_parallel_size}"
    )
    if plan.expert_parallel_size > 1:
        layout += f" (EP {plan.expert_parallel_size})"
    batch = f"{plan.global_batch_size} x {plan.seq_length} = {plan.tokens_per_step:,} tokens"
    return (
        f"{plan.num_parameters:,} parameters, {plan.precision}, {layout}, ZeRO {plan.zero_stage}, started by "
        f"{launch.launcher}\n{plan.run.training.steps:,} steps of {batch}"
    )


def remarks(plan: Plan, data: "RunData") -> list[str]:
    """What the run will not do although one might expect it, one sentence each."""
    found = []
    if plan.run.checkpoint.directory is None:
        found.append("checkpoint.directory is not set: nothing will be saved")
    elif plan.run.shared_folder is None and plan.world_size > 1:
        found.append(
            "logging.directory is not set, and the checkpoints are in an object store: ranks learn of each other's end "
            "late, and no one watches for hangs"
        )
    if plan.run.training.eval_interval and not data.validation:
        found.append(
            f"training.eval_interval={plan.run.training.eval_interval} but the validation split of data.split="
            f"{list(plan.run.data.split)} is shorter than one sample: there will be no validation"
        )
    return found


def train(
    plan: Plan,
    ranks: "Ranks",
    engine: "Engine",
    checkpoints: "Checkpoints",
    data: "RunData",
    console: Console,
    stop: StopSignal,
) -> "TrainState":
    """The loop: update, report, evaluate, save.

    Raises:
        DataError: a sample of this rank has a token outside the vocabulary.
        CheckpointError: a checkpoint cannot be written, or belongs to another model.
        TrainingError: the loss is not finite.
    """
    from megagpt.checkpoint import TrainState
    from megagpt.metrics import Meter
    from megagpt.optim import learning_rate
    from megagpt.parallel.consensus import Consensus
    from megagpt.supervise.careful import CarefulSteps, Rewindable
    from megagpt.supervise.returning import Returning

    run, total_steps = plan.run, plan.run.training.steps
    pulse = engine.pulse
    pulse.enter(Phase.RESTORE)
    restored = checkpoints.restore_latest()
    if restored is None and plan.model.init_from is not None:
        from megagpt.pretrained import load_pretrained

        load_pretrained(plan, engine, ranks, console)
    elif restored is None and engine.is_blank:
        raise CheckpointError(
            f"checkpoint.directory={run.checkpoint.directory} had checkpoints when the run started and has none now; "
            "start it again for a new run, or bring them back"
        )
    state = restored or TrainState()
    votes = Consensus(ranks, width=2)
    stopping = Stopping(stop, _deadline(plan, ranks, checkpoints.restored_save_seconds), votes)
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(Meter(plan, console, first_step=state.step)) as meter,
        contextlib.ExitStack() as readers,
    ):
        checkpoints.on_saved = lambda saved: _tell(saved, meter, stopping)
        careful = CarefulSteps(plan, engine, ranks, meter.say)
        returning = Returning(plan, checkpoints, careful, meter.say)
        supply = _supply(plan, ranks)
        batches = Rewindable(readers.enter_context(supply.training(data.train, state.samples)))
        evaluate_split = _evaluator(plan, engine, data, supply, meter, stopping)
        # Also what was due when the run was told to stop, which saves at once.
        if due(state.step, run.training.eval_interval) and not state.evaluated:
            evaluate_split("validation", state.step)
        reason = stopping.before_the_first_step(evaluations_ahead(plan, state.step))
        saved_step, owes_save = state.step, False
        while state.step < total_steps and reason is None:
            pulse.begin_step(state.step)
            rate = learning_rate(state.step, plan)
            result = careful.take(batches, rate, state.step + 1, state.samples)
            pulse.enter(Phase.BETWEEN)
            state = state.advance(samples=plan.global_batch_size, skipped=result.skipped)
            checkpoints.poll()
            meter.record(state.step, rate, result.loss, result.grad_norm, result.loss_scale, result.skipped)
            is_last = state.step == total_steps
            reason = None if is_last else stopping.after_step(evaluations_ahead(plan, state.step))
            if careful.bad_in_a_row == 1:  # nothing could be saved: one more step, after which the reason is the same
                reason = None
            # Who stops it may not wait: an evaluation that is due is made when the run goes on.
            evaluates = is_last or (due(state.step, run.training.eval_interval) and reason is None)
            saves = is_last or due(state.step, run.checkpoint.save_interval) or owes_save or reason is not None
            reports = evaluates or saves or due(state.step, run.logging.interval)
            if reports:  # before a save: what is recorded up to a checkpoint survives a kill, and is finite
                meter.report(engine.expert_figures())
            if careful.bad_in_a_row and (is_last or careful.bad_in_a_row == run.supervision.max_bad_steps):
                checkpoints.wait()
                state = returning.go_back(state.step, state.samples)
                saved_step, owes_save = state.step, False
                meter.go_back(state.step)
                readers.close()
                batches = Rewindable(readers.enter_context(supply.training(data.train, state.samples)))
                continue
            if evaluates:
                evaluate_split("validation", state.step)
                state = dataclasses.replace(state, evaluated=True)
            if is_last:
                evaluate_split("test", state.step)
            owes_save = saves and careful.bad_in_a_row > 0  # the weights are in doubt until a step is good again
            if saves and not owes_save:
                pulse.enter(Phase.SAVE)
                _save(checkpoints, state, meter)
                saved_step = state.step
            if is_last or reason is not None:
                pulse.enter(Phase.SAVE)
                checkpoints.wait()
        if reason is not None:
            meter.say(f"{meter.at(state.step)}  {reason}; {_way_on(plan, state.step, saved_step)}")
    votes.close()
    return state


def _supply(plan: Plan, ranks: "Ranks") -> "Supply":
    """Where this rank's micro-batches come from. Collective."""
    from megagpt.data.supply import Supply
    from megagpt.parallel.replica import Channel

    training, evaluation = Channel(plan, ranks), Channel(plan, ranks)
    return Supply(plan, ranks.data_rank, ranks.device, training, evaluation)


def _deadline(plan: Plan, ranks: "Ranks", save_seconds: float | None) -> Deadline:
    """What rank 0 knows of the scheduler, this process's own start, and how long a save took before."""
    minutes = plan.run.supervision.stop_after_minutes
    started = psutil.Process().create_time()
    deadline = Deadline(
        end_of_job() if ranks.rank == 0 else None,
        None if minutes is None else started + 60 * minutes,
        None if plan.run.checkpoint.directory is None else plan.checkpoint_bytes // plan.world_size,
    )
    if save_seconds is not None:
        deadline.note_save(save_seconds)
    return deadline


def _way_on(plan: Plan, step: int, saved_step: int) -> str:
    if plan.run.checkpoint.directory is None:
        return "nothing was saved, as checkpoint.directory is not set"
    if saved_step == step:
        return "the same command goes on from here"
    return f"the last steps were bad, so nothing was saved; the same command goes on from step {saved_step:,}"


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens now; an interval of 0 means never."""
    return interval > 0 and step % interval == 0


def evaluations_ahead(plan: Plan, step: int) -> int:
    """Evaluations after `step` and until the run can stop the next time: what the ranks have said after a step they
    learn after the next one, and do not heed after the last one, which two evaluations follow."""
    total, interval = plan.run.training.steps, plan.run.training.eval_interval
    return sum(2 if after == total else due(after, interval) for after in range(step, step + 3))


def _evaluator(
    plan: Plan, engine: "Engine", data: "RunData", supply: "Supply", meter: "Meter", stopping: Stopping
) -> Callable[[str, int], None]:
    from megagpt.evaluate import evaluate

    def evaluate_split(split: str, step: int) -> None:
        held_out = data.validation if split == "validation" else data.test
        if not held_out:
            return
        started = time.monotonic()
        engine.pulse.enter(Phase.EVALUATE)
        losses = [evaluate(engine, part.stream, supply, plan.run.training.eval_batches) for part in held_out]
        mean = sum(part.share * loss for part, loss in zip(held_out, losses, strict=True))
        by_name = {part.name: loss for part, loss in zip(held_out, losses, strict=True) if part.name}
        meter.report_eval(split, mean, step, by_name)
        meter.pause(time.monotonic() - started)
        stopping.note_evaluation(time.monotonic() - started)

    return evaluate_split


def _save(checkpoints: "Checkpoints", state: "TrainState", meter: "Meter") -> None:
    started = time.monotonic()
    checkpoints.save(state, meter.latest)
    meter.pause(time.monotonic() - started)


def _tell(saved: "Saved", meter: "Meter", stopping: Stopping) -> None:
    stopping.note_save(saved.seconds)
    meter.say(
        f"{meter.at(saved.step)}  saved {saved.folder} in {saved.seconds:.1f} s, for which training stood still "
        f"{saved.stall:.2f} s"
    )


if __name__ == "__main__":
    run_command(main, leave_at_once=True)
