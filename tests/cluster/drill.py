"""Have runs on a cluster of namespaces meet faults, time and again, and the doctor find what is wrong; prints verdicts.

    python tests/cluster/drill.py                                  # each fault and each ailment once
    python tests/cluster/drill.py "node lost" "link cut" --times 5
    python tests/cluster/drill.py --list

Needs root, and the Debian packages that .ci/run installs. Exit status 1 if something went otherwise than it must.
"""

import argparse
import sys
import time
from pathlib import Path

from ailments import AILMENTS, examine
from bed import obstacle, running_cluster
from drilling import Fault, Met
from faults import FAULTS
from rehearsal import Rehearsal


def drill_all(names: list[str], times: int, transcripts: Path | None) -> list[tuple[str, str]]:
    """Each fault so many times: name and verdict.

    Args:
        names: of faults and ailments.
        times: that each is met.
        transcripts: folder for what the last run of each fault has printed.
    """
    verdicts = []
    for num_nodes in (2, 3):
        wanted = [name for name in names if name in FAULTS and FAULTS[name].num_nodes == num_nodes]
        ailing = [name for name in names if name in AILMENTS and num_nodes == 2]
        if not wanted and not ailing:
            continue
        with running_cluster(num_nodes) as cluster:
            rehearsal = Rehearsal(cluster)
            for name in wanted:
                verdicts.append((name, _told(name, _drilled(rehearsal, FAULTS[name], times))))
                if transcripts is not None:
                    (transcripts / f"{name}.txt").write_text(rehearsal.transcript)
            for name in ailing:
                verdicts.append((name, _told(name, _diagnosed(rehearsal, name, times))))
    return verdicts


def _told(name: str, verdict: str) -> str:
    print(f"{time.strftime('%X')}  {name}: {verdict}", flush=True)
    return verdict


def _drilled(rehearsal: Rehearsal, fault: Fault, times: int) -> str:
    met: list[Met] = []
    try:
        while len(met) < times:
            met += rehearsal.drill(*[fault] * min(times - len(met), 1 if fault.once or fault.plant else 5))
    except (AssertionError, OSError) as error:
        return f"FAILED after {len(met)} times: {error}"
    said, gone = max(one.said_after for one in met), max(one.gone_after for one in met)
    return f"{len(met)} x passed; said within {said:.0f} s, ended within {gone:.0f} s more; {met[-1].line[:300]}"


def _diagnosed(rehearsal: Rehearsal, name: str, times: int) -> str:
    ailment = AILMENTS[name]
    for number in range(times):
        run = rehearsal.run(4)
        findings, printed = examine(rehearsal.cluster, run, (ailment,))
        bad = [f"{found['check']} {found['status']}: {found['text']}" for found in findings if found["status"] != "OK"]
        if not ailment.is_in(findings):
            return f"FAILED after {number} times: {bad}\n{printed}"
    return f"{times} x found; {'; '.join(bad)[:300]}"


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults and ailments; default: all")
    parser.add_argument("--times", type=int, default=1, help="how often each is met (1)")
    parser.add_argument("--list", action="store_true", help="name them")
    parser.add_argument("--transcripts", metavar="FOLDER", type=Path, help="keep what the runs print there")
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
    verdicts = drill_all(args.names or known, args.times, args.transcripts)
    return int(any(verdict.startswith("FAILED") for _, verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
