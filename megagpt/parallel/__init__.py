"""Processes, groups, devices and random numbers: everything that a rank must know about its place in the job."""

from megagpt.parallel.console import Console, quiet_libraries
from megagpt.parallel.launch import Launch, detect_launch
from megagpt.parallel.ranks import Ranks, start_ranks, start_single_process, stop_ranks

__all__ = [
    "Console",
    "Launch",
    "Ranks",
    "detect_launch",
    "quiet_libraries",
    "start_ranks",
    "start_single_process",
    "stop_ranks",
]
