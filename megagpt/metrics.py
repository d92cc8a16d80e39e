"""What a run reports: a progress bar or plain lines, metrics.jsonl and TensorBoard.

Losses and norms are kept on the device and fetched once per report, so that steps in between never wait.
"""

import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor

from megagpt.data.files import write_whole
from megagpt.errors import TrainingError
from megagpt.parallel.console import Console
from megagpt.plan import Plan
from megagpt.supervise.returning import divergence_advice

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

MAX_SKIPPED_IN_A_ROW = 50
"""fp16 halves its scale at each skipped update: from the largest one it reaches the smallest before this many."""

METRICS_FILE = "metrics.jsonl"
PREVIOUS_METRICS_FILE = "metrics.previous.jsonl"


class _Record(NamedTuple):
    step: int
    learning_rate: float
    loss: Tensor
    grad_norm: Tensor
    loss_scale: float | None
    skipped: bool


class Meter:
    """Collects and reports the figures of a run; writes on rank 0 only.

    Args:
        plan: gives intervals, sizes and folders.
        console: where lines go.
        first_step: updates done before this process. Records of later updates are dropped; a run that starts at 0
            keeps what another one has left in the folder as metrics.previous.jsonl.

    Raises:
        DataError: the records of an earlier process cannot be rewritten.
    """

    def __init__(self, plan: Plan, console: Console, first_step: int):
        self.plan, self.console = plan, console
        self._pending: list[_Record] = []
        self._skipped_in_a_row = 0
        self._last_report = self._run_started = time.monotonic()
        self._first_step = self._step = first_step
        self._paused = 0.0
        self.latest: dict[str, float] = {}
        """Last known losses by name."""
        directory = plan.run.logging.directory
        self._file = self._writer = None
        if console.is_writer and directory is not None:
            folder = Path(directory)
            folder.mkdir(parents=True, exist_ok=True)
            _keep_records_until(folder / METRICS_FILE, first_step)
            self._file = (folder / METRICS_FILE).open("a")
            self._writer = _tensorboard(folder, first_step)
        self._bar = _progress_bar(plan, first_step) if console.is_writer and _on_terminal() else None

    def record(
        self,
        step: int,
        learning_rate: float,
        loss: Tensor,
        grad_norm: Tensor | float | None,
        loss_scale: float | None = None,
        skipped: bool = False,
    ) -> None:
        """Note a step; nothing is fetched from the device.

        Args:
            step: steps done, this one included.
            learning_rate: of this step's update.
            loss: mean loss per token, on the device.
            grad_norm: norm of the gradient before clipping, on the device.
            loss_scale: fp16 only: factor of the loss in the backward pass.
            skipped: the weights were left as they are.
        """
        assert grad_norm is not None, "DeepSpeed's optimizers give a norm after each update"
        norm = torch.as_tensor(grad_norm).detach()
        self._pending.append(_Record(step, learning_rate, loss.detach(), norm, loss_scale, skipped))
        self._step = step
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=step)

    def report(self, experts: dict[str, float] | None = None) -> None:
        """Fetch, print and write what has been recorded since the last report: the one wait for the device.

        Args:
            experts: figures about experts since the last report, by name.

        Raises:
            TrainingError: a loss or norm is not finite although the update was made, or fp16 has skipped too many
                updates in a row; on all ranks, as all have the same values.
        """
        if not self._pending:
            return
        records, self._pending = self._pending, []
        device = records[-1].loss.device
        pairs = [torch.stack([value.to(device).float() for value in (r.loss, r.grad_norm)]) for r in records]
        values = torch.stack(pairs).tolist()
        now = time.monotonic()
        seconds = max(now - self._last_report - self._paused, 1e-9)
        tokens_per_second = len(records) * self.plan.tokens_per_step / seconds
        self._last_report, self._paused = now, 0.0
        common = {"tokens_per_second": tokens_per_second, "memory_gb": memory_gb(), **(experts or {})}
        for record, (loss, norm) in zip(records, values, strict=True):
            figures = {"loss": loss, "learning_rate": record.learning_rate, "grad_norm": norm}
            if record.loss_scale is not None:
                figures["loss_scale"] = record.loss_scale
            if record.loss_scale is not None or record.skipped:
                figures["skipped"] = int(record.skipped)
            self._write(record.step, "train", figures | (common if record.step == self._step else {}))
        self.latest["train_loss"] = values[-1][0]
        seconds_per_step = (now - self._run_started) / max(self._step - self._first_step, 1)
        left = (self.plan.run.training.steps - self._step) * seconds_per_step
        self._show(records, values[-1][0], values[-1][1], common, left)
        for record, (loss, norm) in zip(records, values, strict=True):
            # fp16 may skip for its gradients; a loss that is no number is skipped only if the run is told to go on.
            excused = record.skipped and (math.isfinite(loss) or self.plan.run.supervision.max_bad_steps > 0)
            if not (excused or (math.isfinite(loss) and math.isfinite(norm))):
                numbers = f"loss {loss:.4g}, gradient norm {norm:.4g}"
                raise TrainingError(f"step {record.step}: {numbers}: {divergence_advice(self.plan)}")
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if record.skipped else 0
            if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(_only_overflows(self.plan, record.step, record.loss_scale))

    def report_eval(self, split: str, loss: float, step: int, by_dataset: dict[str, float] | None = None) -> None:
        """Print and write the loss on held-out text.

        Args:
            split: `validation` or `test`.
            loss: mean loss per token.
            step: updates done.
            by_dataset: the losses of which `loss` is the mean, by name.

        Raises:
            TrainingError: the loss is not finite; nothing of it may reach a checkpoint.
        """
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step}: the {split} loss is {loss}: the last updates broke the weights; lower optimizer.lr or "
                "lengthen optimizer.warmup_steps, then run the same command to go on from the last checkpoint"
            )
        self.latest[f"{split}_loss"] = loss
        self._write(step, split, {"loss": loss, "perplexity": perplexity(loss)})
        for name, part in (by_dataset or {}).items():
            self.latest[f"{split}/{name}_loss"] = part
            self._write(step, f"{split}/{name}", {"loss": part, "perplexity": perplexity(part)})
        parts = ", ".join(f"{name} {part:.4f}" for name, part in (by_dataset or {}).items())
        self.say(
            f"{self.at(step)}  {split} loss {loss:.4f}  perplexity {perplexity(loss):,.2f}"
            + (f"  ({parts})" if parts else "")
        )

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation or saving out of the next tokens/s."""
        self._paused += seconds

    def go_back(self, step: int) -> None:
        """Drop what is recorded of steps after `step`: they are about to be done again."""
        self._pending.clear()
        self._step, self._skipped_in_a_row = step, 0
        if self._file is not None and self._writer is not None:
            path = Path(self._file.name)
            self._file.close()
            self._writer.close()
            _keep_records_until(path, step)
            self._file, self._writer = path.open("a"), _tensorboard(path.parent, step)

    def at(self, step: int) -> str:
        """How lines about a step begin."""
        steps = f"{self.plan.run.training.steps:,}"
        return f"step {step:>{len(steps)},}/{steps}"

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False, markup=False)
        else:
            self.console.say(text)

    def close(self) -> None:
        """Take the progress bar away and close the files."""
        if self._bar is not None:
            self._bar[0].stop()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _show(self, records: list[_Record], loss: float, norm: float, common: dict[str, float], left: float) -> None:
        figures, speed = f"loss {loss:.4f}  lr {records[-1].learning_rate:.2e}", common["tokens_per_second"]
        if self._bar is not None:  # with the bar and the time left, that is what 80 columns hold
            self._bar[0].update(self._bar[1], figures=f"{figures}  {speed:,.0f} tokens/s")
            return
        if records[-1].loss_scale is not None:
            skipped = sum(record.skipped for record in records)
            figures += f"  loss scale {records[-1].loss_scale:,.0f}" + (f" ({skipped} skipped)" if skipped else "")
        figures += f"  grad norm {norm:.3f}  {speed:,.0f} tokens/s  {common['memory_gb']:.2f} GB"
        if "expert_load_max_over_mean" in common:
            figures += f"  busiest expert {common['expert_load_max_over_mean']:.1f} x mean"
        self.console.say(f"{self.at(self._step)}  {figures}  {timedelta(seconds=round(left))} left")

    def _write(self, step: int, group: str, figures: dict[str, float]) -> None:
        if self._file is not None:
            # JSON has no word for nan and inf.
            written = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            self._file.write(json.dumps({"step": step, "split": group, **written}) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def perplexity(loss: float) -> float:
    """exp(loss): the number of equally likely tokens that would give this loss."""
    return math.exp(min(loss, 700.0))  # exp overflows beyond 709


def _on_terminal() -> bool:
    # Open MPI gives rank 0 a terminal of its own even if mpirun writes to a file.
    return sys.stdout.isatty() and "OMPI_COMM_WORLD_RANK" not in os.environ


def memory_gb() -> float:
    """Peak memory of this rank in GB (1e9 bytes): device memory on a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def _keep_records_until(path: Path, step: int) -> None:
    """Drop records of updates that are about to be done again, and a line cut off by a kill."""
    if not path.exists():
        return
    if step == 0:
        path.replace(path.with_name(PREVIOUS_METRICS_FILE))
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept).encode())


def _only_overflows(plan: Plan, step: int, loss_scale: float | None) -> str:
    scaling = (
        "fp16.initial_scale_power or fp16.min_loss_scale" if plan.deepspeed.loss_scale_is_dynamic else "fp16.loss_scale"
    )
    return (
        f"step {step}: the gradients of the last {MAX_SKIPPED_IN_A_ROW} steps overflowed in fp16, with a loss scale of "
        f"{loss_scale:g} now, so no weight was updated; use bf16, or a smaller {scaling}"
    )


def _tensorboard(folder: Path, first_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides what earlier files hold from purge_step on; the evaluation at step 0 belongs to a fresh run.
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)


def _progress_bar(plan: Plan, first_step: int) -> "tuple[Progress, Any]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    progress.start()
    return progress, progress.add_task("train", total=plan.run.training.steps, completed=first_step, figures="")
