"""Checkpoints: complete or not there, readable by any layout."""

from megagpt.checkpoint.checkpoints import Checkpoints, TrainState, finished_step
from megagpt.checkpoint.reader import CheckpointReader, find_checkpoint, list_checkpoints

__all__ = ["CheckpointReader", "Checkpoints", "TrainState", "find_checkpoint", "finished_step", "list_checkpoints"]
