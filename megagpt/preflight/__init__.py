"""Look for what would break a run before it starts: on one host, or on all hosts of a job."""

from megagpt.preflight.examination import examine
from megagpt.preflight.findings import Finding, table

__all__ = ["Finding", "examine", "table"]
