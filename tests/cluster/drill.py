"""Have runs on a cluster of namespaces meet faults, time and again, and the doctor find what is wrong; prints verdicts.

    python tests/cluster/drill.py                                  # each fault and each ailment once
    python tests/cluster/drill.py "node lost" "link cut" --times 5
    python tests/cluster/drill.py --list

Needs root, and the Debian packages that .ci/run installs. Exit status 1 if something went otherwise than it must.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ailments import AILMENTS, examine
from bed import obstacle, running_cluster
from drilling import Met
from faults import FAULTS
from rehearsal import Rehearsal

DOCUMENT = """# Faults, and what comes of them

Written by `python tests/cluster/drill.py --write tests/cluster/DRILLS.md --times 5`; do not edit. With the names of
some drills it replaces their rows only.

On a cluster of namespaces (real Slurm, two nodes, or three where one is free), `slurm/pretrain.sbatch` trains a tiny
model with TP 2 x PP 2 (PP 2 x DP 2 for the flipped bit) and meets a fault in mid-course. It has passed if the run ends
with the very losses that one host has undisturbed, or, where it says so, stops with the right words; if it has told the
fault within 60 s and ended within 60 s more; and if no process, port or shared-memory file is left on any node. Slurm
takes a node for lost after 10 s here.

| fault | times | slowest | what is said |
|---|---|---|---|
{faults}

## What the doctor finds

Faults of one node, each planted on the same cluster and looked for by `srun python tools/doctor.py`.

| fault | times | | what is found |
|---|---|---|---|
{ailments}
"""


@dataclass(frozen=True)
class Verdict:
    """What came of one drill."""

    name: str
    times: int
    """That it went as it must."""
    figures: str
    words: str
    """Of the run or the doctor; or what was wrong."""
    is_good: bool = True

    def __str__(self) -> str:
        if not self.is_good:
            return f"{self.name}: FAILED after {self.times} times: {self.words}"
        return f"{self.name}: {self.times} x passed{self.figures and ', '}{self.figures}: {self.words}"

    def row(self) -> str:
        """Of the document's table."""
        times = f"{self.times}" if self.is_good else f"FAILED after {self.times}"
        return f"| {self.name} | {times} | {self.figures} | {self.words.splitlines()[0][:400].replace('|', '/')} |"


def drill_all(names: list[str], times: int, transcripts: Path | None) -> Iterator[Verdict]:
    """Each fault and ailment so many times; yields the verdicts.

    Args:
        names: of faults and ailments.
        times: that each is met.
        transcripts: folder for what the last run of each fault has printed.
    """
    for num_nodes in (2, 3):
        wanted = [name for name in names if name in FAULTS and FAULTS[name].num_nodes == num_nodes]
        ailing = [name for name in names if name in AILMENTS and num_nodes == 2]
        if not wanted and not ailing:
            continue
        with running_cluster(num_nodes) as cluster:
            rehearsal = Rehearsal(cluster)
            for name in wanted:
                yield _drilled(rehearsal, name, times)
                if transcripts is not None:
                    (transcripts / f"{name}.txt").write_text(rehearsal.transcript)
            for name in ailing:
                yield _diagnosed(rehearsal, name, times)


def _drilled(rehearsal: Rehearsal, name: str, times: int) -> Verdict:
    fault, met = FAULTS[name], list[Met]()
    try:
        while len(met) < times:
            met += rehearsal.drill(*[fault] * min(times - len(met), 1 if fault.once or fault.plant else 5))
    except (AssertionError, OSError) as error:
        return Verdict(name, len(met), "", str(error), is_good=False)
    said, gone = max(one.said_after for one in met), max(one.gone_after for one in met)
    figures = f"said after {said:.0f} s" if met[-1].line and not fault.plant else ""
    if fault.then != "on":
        figures += f"{figures and ', '}ended {gone:.0f} s later"
    return Verdict(name, len(met), figures, met[-1].line or "nothing: it goes on")


def _diagnosed(rehearsal: Rehearsal, name: str, times: int) -> Verdict:
    ailment, words = AILMENTS[name], ""
    for number in range(times):
        findings, printed = examine(rehearsal.cluster, rehearsal.run(4), (ailment,))
        if not ailment.is_in(findings):
            return Verdict(name, number, "", f"not found\n{printed}", is_good=False)
        words = "; ".join(f"{found['status']}: {found['text']}" for found in findings if found["status"] != "OK")
    return Verdict(name, times, "", words)


def write(path: Path, verdicts: list[Verdict]) -> None:
    """Put the verdicts into the document; rows of other drills stay."""
    rows = {verdict.name: verdict.row() for verdict in verdicts}
    for line in path.read_text().splitlines() if path.exists() else []:
        name = line.removeprefix("| ").partition(" | ")[0]
        if line.startswith("| ") and name in {*FAULTS, *AILMENTS}:
            rows.setdefault(name, line)
    text = DOCUMENT.format(
        faults="\n".join(rows[name] for name in FAULTS if name in rows),
        ailments="\n".join(rows[name] for name in AILMENTS if name in rows),
    )
    path.write_text(re.sub(r"/tmp/megagpt-cluster-\w+/", "/tmp/", text))


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults and ailments; default: all")
    parser.add_argument("--times", type=int, default=1, help="how often each is met (1)")
    parser.add_argument("--list", action="store_true", help="name them")
    parser.add_argument("--transcripts", metavar="FOLDER", type=Path, help="keep what the runs print there")
    parser.add_argument("--write", metavar="FILE", type=Path, help="put the verdicts into the table of this document")
    args = parser.parse_args()
    known = [*FAULTS, *AILMENTS]
    if args.list:
        print("\n".join(known))
        return 0
    if unknown := set(args.names) - set(known):
        parser.error(f"no such drill: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tiny`
    if reason := obstacle():
        parser.error(reason)
    if args.transcripts is not None:
        args.transcripts.mkdir(parents=True, exist_ok=True)
    verdicts = []
    for verdict in drill_all(args.names or known, args.times, args.transcripts):
        print(f"{time.strftime('%X')}  {verdict}", flush=True)
        verdicts.append(verdict)
        if args.write is not None:
            write(args.write, verdicts)
    return int(not all(verdict.is_good for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
