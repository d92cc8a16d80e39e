"""Processes, groups, devices and random numbers: everything that a rank must know about its place in the job.

Nothing is imported here: `launch` and `console` must be usable before torch is.
"""
