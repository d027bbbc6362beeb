"""kill -9 at random moments of a run that writes a checkpoint at every step: does it always go on, from a whole file?

    python benchmarks/kill_nine.py                                50 kills, then the same with TMPDIR on /dev/shm
    python benchmarks/kill_nine.py --kills 10 --tmpdir /dev/shm   fewer, and TMPDIR on another file system only

One process does the slow imports; each life of the run is a fork of it, so that kills fall into training, the writing
of checkpoints, evaluation and the record rather than into imports. A run that came to its end is compared with an
undisturbed one and begins anew, until there were enough kills. Exit code 1, and what was wrong, at the first fault.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fluidscale.folder import RunFolder, trunk_folder
from fluidscale.record import VOLATILE, Placement
from fluidscale.run import run
from fluidscale.spec import RunSpec
from fluidscale.sweep import load_sweep
from fluidscale.train.checkpoint import NEWEST, PREVIOUS, newest_loadable
from fluidscale.train.fit import fit as _imported  # noqa: F401  with everything that a life would import first

ALWAYS = Placement(device="cpu", checkpoint_steps=1)
STEPS = 120


class Fault(RuntimeError):
    """What must never happen."""


def spec_of() -> RunSpec:
    """The smoke sweep's smallest run, shorter: its checkpoint is written in a few milliseconds, as often as can be."""
    spec = load_sweep("smoke", sizes=["50K"], arms=["continuous-random"]).runs[0]
    train = dataclasses.replace(spec.train, batch=8, steps=STEPS, decay_steps=STEPS // 4, warmup_steps=4)
    evaluate = dataclasses.replace(spec.evaluate, val_images=16, geneval_images_per_prompt=0, fd_images=0)
    data = dataclasses.replace(spec.data, images_unique=64)
    return dataclasses.replace(spec, train=train, evaluate=evaluate, data=data)


def forked(work: Callable[[], object]) -> int:
    """Starts a process that has all imports done; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return child


def survive(kills: int, folder: Path, seed: int = 0) -> dict[str, float]:
    """Kills runs of one spec that often; raises Fault when one does not go on, or ends as the undisturbed did not."""
    spec, draw = spec_of(), random.Random(seed)
    straight, killed = folder / "straight" / spec.id, folder / "killed" / spec.id
    started = time.monotonic()
    _, status = os.waitpid(forked(lambda: run(spec, straight, ALWAYS)), 0)
    if status:
        raise Fault("the undisturbed run failed")
    life = time.monotonic() - started
    done = finished = in_writing = 0
    while done < kills:
        child = forked(lambda: run(spec, killed, ALWAYS))
        _wait(killed, draw, life)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
            in_writing += _look(killed)
        elif status:
            raise Fault(f"it failed after {done} kills: {RunFolder(killed).status.get('error')}")
        if RunFolder(killed).record is not None:
            finished += 1
            _compare(straight, killed)
            shutil.rmtree(folder / "killed")
    _, status = os.waitpid(forked(lambda: run(spec, killed, ALWAYS)), 0)
    if status:
        raise Fault(f"it does not go on: {RunFolder(killed).status.get('error')}")
    _compare(straight, killed)
    return {"kills": done, "in_the_middle_of_a_write": in_writing, "runs": finished + 1, "life_seconds": life}


def _wait(run_dir: Path, draw: random.Random, life: float) -> None:
    """Until the moment of the kill: anywhere in a life, or (three of four) soon after its first checkpoint."""
    newest, born = RunFolder(run_dir).checkpoints / NEWEST, time.time()
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0.02, 0.7 * life))
        return
    while time.time() - born < life:
        with contextlib.suppress(FileNotFoundError):
            if newest.stat().st_mtime > born:
                break
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.5))


def _look(run_dir: Path) -> bool:
    """Every checkpoint that has its name is whole; True when the kill left one half written beside it."""
    folder = RunFolder(run_dir).checkpoints
    for path in (folder / NEWEST, folder / PREVIOUS):
        if path.exists() and newest_loadable([path], STEPS) is None:
            raise Fault(f"{path}: corrupt")
    return bool(list(folder.glob(".*.tmp")))


def _compare(straight: Path, killed: Path) -> None:
    left, right = RunFolder(straight), RunFolder(killed)
    if left.weights.read_bytes() != right.weights.read_bytes():
        raise Fault("other weights than the undisturbed run's")
    rows = [{key: value for key, value in (f.record or {}).items() if key not in VOLATILE} for f in (left, right)]
    if rows[0] != rows[1]:
        raise Fault(f"another record than the undisturbed run's: {rows}")
    lines = [[json.loads(line) for line in f.metrics.read_text().splitlines()] for f in (left, right)]
    if [(a["step"], a["train_loss"]) for a in lines[0]] != [(a["step"], a["train_loss"]) for a in lines[1]]:
        raise Fault("other losses than the undisturbed run's")
    places = (right.checkpoints, trunk_folder(killed.parent, spec_of().trunk_id))
    if left_over := [path for place in places for path in place.glob(".*.tmp")]:
        raise Fault(f"left behind: {left_over}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--tmpdir", help="TMPDIR of the runs; default: as it is, then /dev/shm")
    arguments = parser.parse_args()
    for place in [arguments.tmpdir] if arguments.tmpdir else [tempfile.gettempdir(), "/dev/shm"]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TMPDIR"] = place
            try:
                found = survive(arguments.kills, Path(folder))
            except Fault as fault:
                print(fault, file=sys.stderr)
                return 1
        print(json.dumps({"tmpdir": place, **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
