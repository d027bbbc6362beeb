"""What a tracker that hangs costs a training step: a real MLflow server, stopped (SIGSTOP) and let go on in turn.

    python benchmarks/tracker_hangs.py [--rounds 12]        writes benchmarks/tracker_hangs.md

One run trains on this machine, launched as a user launches it, with the server as its tracker. Its steps are timed by
its own metrics; the two states take turns of a few seconds, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from mini_slurm import eventually, free_ports  # noqa: E402
from mlflow_server import Server  # noqa: E402

TURN_SECONDS = 6.0
# Far more images than the rounds need: the run is cancelled when they are over.
SWEEP = f"""
extends: {ROOT / "sweeps" / "recipe"}
sizes: [190K]
arms: [discrete-raster]
seeds: [0]
images: [4194304]
defaults:
  data: {{images_unique: 1024}}
  evaluate: {{val_images: 64, geneval_images_per_prompt: 0, fd_images: 0}}
"""
Turn = tuple[bool, float, float]


def turns(server: Server, rounds: int) -> list[Turn]:
    """Whether the server hung, from when to when: seconds since the epoch."""
    seen = []
    for number in range(2 * rounds):
        hangs = number % 2 == 1
        server.send(signal.SIGSTOP if hangs else signal.SIGCONT)
        started = time.time()
        time.sleep(TURN_SECONDS)
        seen.append((hangs, started, time.time()))
    server.send(signal.SIGCONT)
    return seen


def step_seconds(metrics: Path, seen: list[Turn]) -> dict[bool, list[float]]:
    """Seconds a step of each interval between two lines of metrics that falls into one turn."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found: dict[bool, list[float]] = {True: [], False: []}
    for before, after in pairwise(lines):
        for hangs, start, end in seen:
            if start <= before["time"] and after["time"] <= end:
                found[hangs].append((after["time"] - before["time"]) / (after["step"] - before["step"]))
    return found


def measured(folder: Path, rounds: int) -> dict[bool, list[float]]:
    (folder / "long.yaml").write_text(SWEEP)
    (folder / "mlflow").mkdir()
    server = Server(folder / "mlflow", free_ports(1)[0])
    server.start()
    words = ["slurm.launch", "submit", str(folder / "long.yaml"), "--profile", "cpu", "--runs", str(folder / "runs")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
    launch = subprocess.Popen([sys.executable, "-m", *words], env=environment, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: list(folder.glob("runs/*/metrics.jsonl")), "the first steps")
        time.sleep(TURN_SECONDS)
        seen = turns(server, rounds)
        (metrics,) = folder.glob("runs/*/metrics.jsonl")
        return step_seconds(metrics, seen)
    finally:
        launch.send_signal(signal.SIGINT)
        launch.wait(300)
        server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each state (default: 12)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), arguments.rounds)
    hung, answering = (statistics.median(found[hangs]) for hangs in (True, False))
    text = f"""# A tracker that hangs

`python benchmarks/tracker_hangs.py --rounds {arguments.rounds}`, {os.cpu_count()} cores: a 190K run trained with an
MLflow server that was stopped (SIGSTOP) and let go on every {TURN_SECONDS:.0f} s, {arguments.rounds} times each.

| server | median step | intervals |
|---|---|---|
| answers | {1000 * answering:.2f} ms | {len(found[False])} |
| hangs | {1000 * hung:.2f} ms | {len(found[True])} |

Ratio {hung / answering:.3f}; wanted: at most 1.05.
"""
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
