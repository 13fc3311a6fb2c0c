"""Attack what the documentation promises, and count what held.

    python -m benchmarks.faults                          # all attacks: ten minutes on two quiet cores
    python -m benchmarks.faults --only kills,races --kills 1000

Each attack prints one line, with examples of what broke. The exit code is 1 if anything did. Servers, registries
and machines are the attacks' own, on the loopback interface, in a folder that is removed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.attacks.attack import Attack
from benchmarks.attacks.lab import Counts, Lab, environment

THEMES = (
    "promotions",
    "artifacts",
    "requests",
    "processes",
    "records",
    "silence",
    "scorers",
    "contracts",
    "trainings",
)
"""Modules of `benchmarks.attacks`, in the order of their attacks."""

QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PYTHONWARNINGS": "ignore",
}
"""What MLflow says while models are logged would stand between the attacks' lines."""


def attacks() -> list[Attack]:
    """All attacks, in order."""
    return [attack for theme in THEMES for attack in import_module(f"benchmarks.attacks.{theme}").ATTACKS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks that were asked for; the exit code says whether all promises held."""
    options = _parser().parse_args(arguments)
    with environment(**QUIET):
        chosen = _chosen(options.only)
        if options.list:
            print("\n".join(f"{attack.name:<16}{attack.promise}" for attack in chosen))
            return 0
        counts = Counts(options.kills, options.races, options.corruptions, options.body_seconds, options.seed)
        return _run(chosen, counts)


def _run(chosen: Sequence[Attack], counts: Counts) -> int:
    began, broken = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="attacks-") as folder:
        lab = Lab(Path(folder), counts)
        for attack in chosen:
            outcome = attack.outcome(lab)
            broken += outcome.is_broken
            print(outcome, flush=True)
    print(f"{len(chosen)} attacks in {time.monotonic() - began:.0f} s, {broken} broke a promise")
    return int(broken > 0)


def _chosen(names: str | None) -> list[Attack]:
    known = {attack.name: attack for attack in attacks()}
    if names is None:
        return list(known.values())
    asked = names.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"unknown attack: {', '.join(unknown)}; --list shows those that there are")
    return [known[name] for name in asked]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = Counts()
    parser.add_argument("--only", metavar="NAME,…", help="these attacks alone")
    parser.add_argument("--list", action="store_true", help="show each attack and the promise that it attacks")
    parser.add_argument("--kills", type=int, default=usual.kills, metavar="N", help="of promotions")
    parser.add_argument("--races", type=int, default=usual.races, metavar="N", help="of two promotions")
    parser.add_argument(
        "--corruptions", type=int, default=usual.corruptions, metavar="N", help="of store and artifacts"
    )
    parser.add_argument(
        "--body-seconds", type=float, default=usual.body_seconds, metavar="N", help="of the search for slow bodies"
    )
    parser.add_argument("--seed", type=int, default=usual.seed)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder is removed, and every process ended
    sys.exit(main())
