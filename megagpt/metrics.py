"""What a run reports: a progress bar or plain lines, metrics.jsonl and TensorBoard.

Losses and norms are kept on the device and fetched once per report, so that steps in between never wait.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from megagpt.evaluate import perplexity
from megagpt.parallel.console import Console
from megagpt.plan import Plan

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class Meter:
    """Collects and reports the figures of a run; writes on rank 0 only.

    Args:
        plan: gives intervals, sizes and folders.
        console: where lines go.
        first_step: updates done before this process; later records of an earlier process are dropped.
    """

    def __init__(self, plan: Plan, console: Console, first_step: int):
        self.plan, self.console = plan, console
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
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
            _drop_records_after(folder / METRICS_FILE, first_step)
            self._file = (folder / METRICS_FILE).open("a")
            self._writer = _tensorboard(folder, first_step)
        self._bar = _progress_bar(plan, first_step) if console.is_writer and sys.stdout.isatty() else None

    def record(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor | float | None) -> None:
        """Note an update; nothing is fetched from the device.

        Args:
            step: updates done, this one included.
            learning_rate: of this update.
            loss: mean loss per token, on the device.
            grad_norm: norm of the gradient before clipping, on the device.
        """
        norm = float("nan") if grad_norm is None else grad_norm
        self._pending.append((step, learning_rate, loss.detach(), torch.as_tensor(norm).detach()))
        self._step = step
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=step)

    def report(self) -> None:
        """Fetch, print and write what has been recorded since the last report: the one wait for the device."""
        if not self._pending:
            return
        device = self._pending[-1][2].device
        values = torch.stack([torch.stack((p[2].to(device).float(), p[3].to(device).float())) for p in self._pending]).tolist()
        now = time.monotonic()
        seconds = max(now - self._last_report - self._paused, 1e-9)
        tokens_per_second = len(self._pending) * self.plan.tokens_per_step / seconds
        self._last_report, self._paused = now, 0.0
        common = {"tokens_per_second": tokens_per_second, "memory_gb": memory_gb()}
        for (step, learning_rate, *_), (loss, norm) in zip(self._pending, values, strict=True):
            figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": norm}
            self._write(step, "train", figures | (common if step == self._step else {}))
        self._pending.clear()
        self.latest["train_loss"] = values[-1][0]
        left = (self.plan.run.training.steps - self._step) * (now - self._run_started) / max(self._step - self._first_step, 1)
        self._show(values[-1][0], learning_rate, values[-1][1], tokens_per_second, common["memory_gb"], left)

    def report_eval(self, split: str, loss: float, step: int) -> None:
        """Print and write the loss on held-out text.

        Args:
            split: `validation` or `test`.
            loss: mean loss per token.
            step: updates done.
        """
        self.latest[f"{split}_loss"] = loss
        self._write(step, split, {"loss": loss, "perplexity": perplexity(loss)})
        self.say(f"step {step:>7,}  {split} loss {loss:.4f}  perplexity {perplexity(loss):,.2f}")

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation or saving out of the next tokens/s."""
        self._paused += seconds

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False, markup=False)
        else:
            self.console.say(text)

    def close(self) -> None:
        """Report the rest and close the files."""
        self.report()
        if self._bar is not None:
            self._bar[0].stop()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _show(self, loss: float, rate: float, norm: float, tokens_per_second: float, memory: float, left: float) -> None:
        remaining = str(timedelta(seconds=round(left)))
        figures = f"loss {loss:.4f}  lr {rate:.2e}  grad norm {norm:.3f}  {tokens_per_second:,.0f} tokens/s  {memory:.2f} GB"
        if self._bar is not None:
            self._bar[0].update(self._bar[1], figures=figures)
        else:
            steps = self.plan.run.training.steps
            width = len(f"{steps:,}")
            self.console.say(f"step {self._step:>{width},}/{steps:,}  {figures}  {remaining} left")

    def _write(self, step: int, group: str, figures: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "split": group, **figures}) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def memory_gb() -> float:
    """Peak memory of this rank in GB (1e9 bytes): device memory on a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def _drop_records_after(path: Path, step: int) -> None:
    """Remove records of updates that are about to be done again, and a line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _tensorboard(folder: Path, first_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _progress_bar(plan: Plan, first_step: int) -> "tuple[Progress, Any]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[figures]}"), TimeRemainingColumn()
    )
    progress.start()
    return progress, progress.add_task("train", total=plan.run.training.steps, completed=first_step, figures="")
