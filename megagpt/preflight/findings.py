"""What has been found, and how it is shown (no torch)."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["OK", "warning", "failed"]
_GRAVITY: dict[Status, int] = {"OK": 0, "warning": 1, "failed": 2}


class Finding(BaseModel):
    """The outcome of one check."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    check: str
    status: Status
    text: str
    """What was found, with figures and hosts."""
    advice: str = ""
    """What to do about it."""


def ok(check: str, text: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check=check, status="OK", text=text)


def warning(check: str, text: str, advice: str) -> Finding:
    """The run may suffer."""
    return Finding(check=check, status="warning", text=text, advice=advice)


def failed(check: str, text: str, advice: str) -> Finding:
    """The run would fail, or come to harm."""
    return Finding(check=check, status="failed", text=text, advice=advice)


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status; OK if there is nothing."""
    return max((finding.status for finding in findings), key=_GRAVITY.__getitem__, default="OK")


def some(items: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    """The first few of what may be many, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def merged(by_host: dict[str, list[Finding]]) -> list[Finding]:
    """One finding per check from those of all hosts: hosts are named where they differ."""
    checks = dict.fromkeys(finding.check for findings in by_host.values() for finding in findings)
    result = []
    for check in checks:
        groups: dict[tuple[Status, str, str], list[str]] = {}
        for host, findings in by_host.items():
            for finding in findings:
                if finding.check == check:
                    groups.setdefault((finding.status, finding.text, finding.advice), []).append(host)
        everywhere = len(groups) == 1 and len(next(iter(groups.values()))) == len(by_host)
        bad = {key: hosts for key, hosts in groups.items() if key[0] != "OK"} or groups
        # Hosts that are well may differ in figures: the first one speaks for all.
        shown = bad if any(key[0] != "OK" for key in bad) else dict([next(iter(bad.items()))])
        for (status, text, advice), hosts in shown.items():
            where = "" if everywhere or status == "OK" else f"{', '.join(hosts)}: "
            result.append(Finding(check=check, status=status, text=where + text, advice=advice))
    return result


def table(findings: Sequence[Finding]) -> str:
    """All findings as lines of text, advice beneath, and a summary."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.check:<{width}}  {finding.status:<7}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':<{width}}           -> {finding.advice}")
    counts = {status: sum(finding.status == status for finding in findings) for status in _GRAVITY}
    lines.append(f"\n{counts['OK']} OK, {counts['warning']} warnings, {counts['failed']} failed")
    return "\n".join(lines)
