"""Mirrors run folders to MLflow: once, to rebuild a deleted experiment, or following runs while they train.

    python -m fluidscale.sync runs                                   everything that lies there, once
    python -m fluidscale.sync runs --follow                          until told to stop (SIGTERM), then once more
    python -m fluidscale.sync runs --tracking-uri http://host:5000   to a server

It runs beside training, never in it: a tracker that is slow or gone costs the runs nothing, and a later call brings
it level.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fluidscale.record import read_json
from fluidscale.spec import InvalidInput

if TYPE_CHECKING:
    from fluidscale.train.tracking import Mirror

log = logging.getLogger("fluidscale.sync")
PAUSE_SECONDS = 10.0
PATIENCE = 3  # runs in a row that a store may fail before a pass is given up
NO_SWEEP = "runs"  # the experiment of runs that no sweep launched


def sweeps_of(runs: Path) -> dict[str, str]:
    """The sweep of each run id, from runs/sweeps/<sweep>.json as the launcher writes them; the oldest file counts."""
    found: dict[str, str] = {}
    for path in sorted((runs / "sweeps").glob("*.json"), key=lambda p: p.stat().st_mtime):
        for run_id in (read_json(path) or {}).get("runs", []):
            found.setdefault(run_id, path.stem)
    return found


def level(mirror: Mirror, runs: Path) -> int:
    """Pushes every run folder once; returns how many could not be, each with a warning.

    One process at a time: two that see a run for the first time would each open one for it. A store that fails several
    runs in a row is left in peace until the next pass: each try costs a timeout.
    """
    with _turn(runs):
        return _level(mirror, runs)


def _level(mirror: Mirror, runs: Path) -> int:
    from fluidscale.train.tracking import without_secrets

    sweeps, failures, in_a_row = sweeps_of(runs), 0, 0
    specs = sorted(runs.glob("*/spec.json"))
    for number, spec in enumerate(specs):
        try:
            mirror.push(spec.parent, sweeps.get(spec.parent.name, NO_SWEEP))
            in_a_row = 0
        except Exception as error:  # any fault of the tracker's: said, counted, tried again at the next pass
            reason = without_secrets(str(error).strip()).splitlines()[:1]
            log.warning("%s: not mirrored (%s)", spec.parent.name, (reason or [type(error).__name__])[0][:200])
            failures, in_a_row = failures + 1, in_a_row + 1
            if in_a_row == PATIENCE and (left := len(specs) - number - 1):
                log.warning("the store does not take them: %d more runs not mirrored in this pass", left)
                return failures + left
    return failures


@contextmanager
def _turn(runs: Path) -> Iterator[None]:
    """Waits until no other process mirrors this folder; the kernel frees the lock of a process that dies."""
    with open(runs / "mlflow" / "sync.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _follow(mirror: Mirror, runs: Path, parent: int) -> int:
    """Keeps the store level until SIGTERM or SIGINT, or until the process that started this one, `parent`, is gone."""
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    while not stop.wait(PAUSE_SECONDS) and os.getppid() == parent:
        level(mirror, runs)
    return level(mirror, runs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument(
        "--tracking-uri", help="MLflow store; default: $MLFLOW_TRACKING_URI, else RUNS/mlflow/mlflow.db"
    )
    parser.add_argument("--follow", action="store_true", help="stay and mirror what is new until told to stop")
    # Whoever starts a follower says its own number: asked for here, a parent that died meanwhile would go unnoticed.
    parser.add_argument(
        "--parent", type=int, default=os.getppid(), metavar="PID",
        help="with --follow: end when this process, which started this one, is gone (default: whichever did)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    log.setLevel(logging.INFO)
    try:
        if not arguments.runs.is_dir():
            raise InvalidInput(f"{arguments.runs}: no such folder; give the folder that holds the runs")
        from fluidscale.train.tracking import Mirror

        mirror = Mirror(arguments.runs, arguments.tracking_uri)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    failures = _follow(mirror, arguments.runs, arguments.parent) if arguments.follow else level(mirror, arguments.runs)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
