"""Stand before the optimizer: an update from numbers that are no numbers, or from a spike, is not made, by any rank.

DeepSpeed's optimizers, of all stages, end their step with that of torch's optimizer on the fp32 master weights, and
copy these to the weights of the forward pass. With torch's step left out the weights stay what they are, and everything
else goes its usual way. All ranks see the same table of losses and norms, so they decide alike.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.ranks import Ranks

Judge = Callable[[float, float], str | None]
"""What is wrong with the mean loss and the gradient norm of a step, in words; None: nothing."""
Check = Callable[[], str | None]
"""What is wrong with the weights before an update, in words, the same on all ranks; collective."""


class UpdateGuard:
    """Asks a judge before each update.

    Args:
        optimizer: torch's, inside DeepSpeed's; its `step` is replaced.
        zero: DeepSpeed's optimizer.
        ranks: this process's place.
        judge: the same on all ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, zero: Any, ranks: Ranks, judge: Judge | None):
        self._zero, self._ranks, self._judge = zero, ranks, judge
        self._loss_sum: Callable[[], Tensor | None] = lambda: None
        self._num_microbatches = 1
        self._asked, self.problem = False, None  # type: bool, str | None
        self.is_rehearsal = False
        """Whether the next step is only to be looked at: nothing is judged nor updated."""
        self.check: Check | None = None
        """Asked before the next update, besides the judge."""
        if judge is not None:
            step = optimizer.step
            optimizer.step = lambda *args, **kwargs: None if self._objects() else step(*args, **kwargs)  # type: ignore

    def begin_step(self, loss_sum: Callable[[], Tensor | None], num_microbatches: int) -> None:
        """Prepare for the next update.

        Args:
            loss_sum: gives the sum of this rank's losses over micro-batches; None on ranks that compute none.
            num_microbatches: of the step.
        """
        self._loss_sum, self._num_microbatches = loss_sum, num_microbatches
        self._asked, self.problem = False, None

    def end_step(self, loss: Tensor, is_fp16: bool) -> str | None:
        """What was wrong with the update, if it was not made; the same on all ranks.

        Args:
            loss: mean over all ranks and micro-batches.
            is_fp16: whether an overflow of the gradients belongs to the trade.
        """
        if self._judge is None or self._asked or self.is_rehearsal or not self._zero.overflow:
            return self.problem
        # DeepSpeed has found the gradients not to be finite, and never came to torch's step.
        value = float(loss)
        if is_fp16 and torch.isfinite(loss):
            return None
        self.problem = self._judge(value, float("nan"))
        return self.problem

    def _objects(self) -> bool:
        if self.is_rehearsal:
            return True
        if not self._asked:  # ZeRO 3 updates its parts one by one: once asked, the answer holds for all
            self._asked = True
            assert self._judge is not None
            self.problem = self._judge(*self._loss_and_norm())
            if self.check is not None and self.problem is None:
                self.problem = self.check()
        return self.problem is not None

    def _loss_and_norm(self) -> tuple[float, float]:
        ranks, loss_sum = self._ranks, self._loss_sum()
        mine = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        if loss_sum is not None:
            mine[0], mine[1] = 1.0, loss_sum.detach().double().squeeze() / self._num_microbatches
        mine[2] = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(ranks.world_size)]
        dist.all_gather(rows, mine)
        table = torch.stack(rows).tolist()  # DeepSpeed has waited for the device to know its norm
        losses = [loss for has_loss, loss, _ in table if has_loss]
        norms = [norm for *_, norm in table]
        finite = all(math.isfinite(norm) and norm >= 0 for norm in norms)  # DeepSpeed says -1 for nan and inf
        return sum(losses) / len(losses), max(norms) if finite else math.nan
