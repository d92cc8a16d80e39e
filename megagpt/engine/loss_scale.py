"""fp16's loss scaling: gradients are computed from a scaled loss, so that small ones do not vanish in fp16.

The scale is halved when gradients overflow (the step is skipped then) and doubled after some steps without an overflow:
Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

_STATE = {
    "scale": "cur_scale",
    "steps": "cur_iter",
    "last_overflow": "last_overflow_iter",
    "hysteresis": "cur_hysteresis",
}
"""Our name and DeepSpeed's attribute of what a checkpoint keeps."""


class LossScaler(DynamicLossScaler):
    """DeepSpeed's dynamic scaler, but a new scale is used from the next step on.

    DeepSpeed's optimizers update the scaler before they divide the gradients by its scale: whenever the scale grew,
    they would come out half as large, and escape the clipping.

    Args:
        given: the scaler made by DeepSpeed from the config.
    """

    cur_scale: float
    cur_hysteresis: int

    def __init__(self, given: DynamicLossScaler):
        super().__init__(
            given.cur_scale,
            given.scale_window,
            given.min_scale,
            given.delayed_shift,
            given.consecutive_hysteresis,
            raise_error_at_min_scale=False,  # a bare Exception; the meter stops a run of overflows in words
            dtype=given.dtype,
        )
        self._next_scale = self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        """Note whether a step's gradients overflowed; called by DeepSpeed's optimizers in the middle of the step."""
        scale = self.cur_scale
        super().update_scale(overflow)
        self._next_scale, self.cur_scale = self.cur_scale, scale

    def end_step(self) -> None:
        """Take over the new scale, once the step is done."""
        self.cur_scale = self._next_scale

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: scale, steps, last_overflow, hysteresis."""
        return {key: getattr(self, attribute) for key, attribute in _STATE.items()}

    def set_state(self, state: dict[str, float]) -> None:
        """Go on from what `state` returned, under limits of the config that may have changed."""
        for key, attribute in _STATE.items():
            setattr(self, attribute, state[key])
        self.cur_scale = self._next_scale = max(self.cur_scale, self.min_scale)
        self.cur_hysteresis = min(self.cur_hysteresis, self.delayed_shift)


def own_loss_scaler(zero: Any) -> LossScaler | None:
    """Give DeepSpeed's optimizer wrapper our scaler if its own is dynamic; None if it is not."""
    given = getattr(zero, "loss_scaler", None)
    if not isinstance(given, DynamicLossScaler):
        return None
    zero.loss_scaler = LossScaler(given)
    return zero.loss_scaler
