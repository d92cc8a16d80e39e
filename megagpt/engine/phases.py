"""The instructions of the pipeline engine: told to this rank's pulse, and prepared for."""

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe import schedule

from megagpt.supervise.pulse import Phase, Pulse

_PHASES = {
    schedule.ForwardPass: Phase.FORWARD,
    schedule.BackwardPass: Phase.BACKWARD,
    schedule.SendActivation: Phase.SEND_ACTIVATION,
    schedule.RecvActivation: Phase.RECEIVE_ACTIVATION,
    schedule.SendGrad: Phase.SEND_GRADIENT,
    schedule.RecvGrad: Phase.RECEIVE_GRADIENT,
    schedule.ReduceTiedGrads: Phase.REDUCE,
    schedule.ReduceGrads: Phase.REDUCE,
    schedule.OptimizerStep: Phase.UPDATE,
}


def tell_phases(wrapped: Any, pulse: Pulse, data: Phase) -> None:
    """Have a PipelineEngine note each instruction of its schedule before it is carried out.

    Args:
        wrapped: the engine.
        pulse: told.
        data: what taking a micro-batch is on this rank: reading it or waiting for it.
    """
    phases = {**_PHASES, schedule.LoadMicroBatch: data}

    def noting(instruction: type, method: Callable[..., Any]) -> Callable[..., Any]:
        phase = phases.get(instruction, Phase.BETWEEN)
        enter = pulse.enter if phase in (Phase.REDUCE, Phase.UPDATE, Phase.BETWEEN) else pulse.enter_next

        def noted(engine: Any, *args: Any, **kwargs: Any) -> Any:
            enter(phase)
            return method(engine, *args, **kwargs)

        return noted

    wrapped._INSTRUCTION_MAP = {key: noting(key, method) for key, method in wrapped._INSTRUCTION_MAP.items()}


def before_forward_passes(wrapped: Any, prepare: Callable[[], None]) -> None:
    """Have a PipelineEngine call a function before each forward pass of a micro-batch through its stage."""
    method = wrapped._INSTRUCTION_MAP[schedule.ForwardPass]

    def prepared(engine: Any, *args: Any, **kwargs: Any) -> Any:
        prepare()
        return method(engine, *args, **kwargs)

    wrapped._INSTRUCTION_MAP = {**wrapped._INSTRUCTION_MAP, schedule.ForwardPass: prepared}
