"""Jobs for Slurm: what each of the batch files is given, checked on the login node before anything is submitted."""

from megagpt.submission.containers import in_container
from megagpt.submission.jobs import Job, conversion_job, evaluation_job, preprocess_job, pretrain_job
from megagpt.submission.partition import Partition, find_partition
from megagpt.submission.resources import Request
from megagpt.submission.sbatch import Chain, script, submit

__all__ = [
    "Chain",
    "Job",
    "Partition",
    "Request",
    "conversion_job",
    "evaluation_job",
    "find_partition",
    "in_container",
    "preprocess_job",
    "pretrain_job",
    "script",
    "submit",
]
