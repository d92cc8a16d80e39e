"""DeepSpeed behind one small interface, the same for pipelines and for a single stage."""

from megagpt.engine.engine import Engine, StepResult, build_engine
from megagpt.engine.fragments import Fragment

__all__ = ["Engine", "Fragment", "StepResult", "build_engine"]
