"""Run config x DeepSpeed config x number of ranks = Plan. Nothing here imports torch."""

from megagpt.plan.config import ModelConfig, RunConfig
from megagpt.plan.deepspeed_config import DeepSpeedConfig, deepspeed_config_from_dict, load_deepspeed_config
from megagpt.plan.estimates import MemoryEstimate
from megagpt.plan.load import load_preset, load_run_config, preset_names, run_config_from_dict
from megagpt.plan.plan import Plan, make_plan
from megagpt.plan.reference import config_reference
from megagpt.plan.report import describe, plan_as_dict
from megagpt.plan.traffic import RING_FACTORS, Transfer, traffic_per_step

__all__ = [
    "RING_FACTORS",
    "DeepSpeedConfig",
    "MemoryEstimate",
    "ModelConfig",
    "Plan",
    "RunConfig",
    "Transfer",
    "config_reference",
    "deepspeed_config_from_dict",
    "describe",
    "load_deepspeed_config",
    "load_preset",
    "load_run_config",
    "make_plan",
    "plan_as_dict",
    "preset_names",
    "run_config_from_dict",
    "traffic_per_step",
]
