"""Which steps are not to be trusted: a loss or norm that is no number, or far above what has been usual (no torch)."""

import math
import statistics
from collections import deque

WINDOW = 128
"""Accepted steps that say what is usual."""
FEWEST = 32
"""Accepted steps before anything but nan and inf is called unusual."""
SMALLEST_SPIKE = 0.1
"""A loss must be this much above the median, as a share of it, whatever the spread."""
NORM_FACTOR = 1e4
"""A norm this many times the median is no gradient: clipping would keep its direction, which is noise."""
_MAD_TO_SIGMA = 1.4826


class SpikeJudge:
    """Remembers accepted losses and norms; judges by median and median absolute deviation, which outliers do not move.

    Args:
        threshold: robust standard deviations above the median that make a spike; 0: losses are not compared.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def __call__(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step in words; None if it is to be trusted, and then it counts as usual from now on."""
        problem = self._problem(loss, norm)
        if problem is None:
            self._losses.append(loss)
            self._norms.append(norm)
        return problem

    def _problem(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if len(self._losses) < FEWEST or self.threshold == 0:
            return None
        median = statistics.median(self._losses)
        sigma = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in self._losses)
        if loss > median + max(self.threshold * sigma, SMALLEST_SPIKE * abs(median)):
            return f"loss {loss:.4g} is a spike: the last {len(self._losses)} had a median of {median:.4g}"
        usual = statistics.median(self._norms)
        if norm > NORM_FACTOR * usual > 0:
            return f"gradient norm {norm:.4g} is a spike: the last {len(self._norms)} had a median of {usual:.4g}"
        return None
