"""Checkpoints: complete or not there, readable by any layout."""

from megagpt.checkpoint.checkpoints import Checkpoints, TrainState
from megagpt.checkpoint.reader import CheckpointReader, find_checkpoint, finished_step, list_checkpoints

__all__ = ["CheckpointReader", "Checkpoints", "TrainState", "find_checkpoint", "finished_step", "list_checkpoints"]
