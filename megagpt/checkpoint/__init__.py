"""Checkpoints: complete or not there, readable by any layout."""

from megagpt.checkpoint.checkpoints import Checkpoints, finished_step, weights_will_be_replaced
from megagpt.checkpoint.reader import CheckpointReader, find_checkpoint, list_checkpoints
from megagpt.checkpoint.state import TrainState

__all__ = [
    "CheckpointReader",
    "Checkpoints",
    "TrainState",
    "find_checkpoint",
    "finished_step",
    "list_checkpoints",
    "weights_will_be_replaced",
]
