"""What a sweep on SLURM costs beside its training, several runs a task: on a real SLURM that this script starts.

    python benchmarks/packing.py seeds --size 50K,80K,190K        writes benchmarks/packing.md

Trains what is missing of the sweep in RUNS, PACK trunks a task, and evaluates it in jobs of their own. A task's time
is sacct's; the training in it is what the steps took by the runs' own metrics. Start-up of Python, loading of data,
checkpoints and validation are the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from mini_slurm import MiniSlurm, cluster, eventually, missing  # noqa: E402

from fluidscale.folder import RunFolder  # noqa: E402
from slurm import attempts  # noqa: E402

# Two tasks at a time, a core each: the nodes are all this machine.
PROFILE = """
slurm: {{device: cpu, threads: 1, precision: 32-true, partition: low, minutes: 600, memory_gb: 0, parallel: 2,
        trunks_per_task: {pack}, evaluation: {{minutes: 600}}}}
"""


def launch(slurm: MiniSlurm, folder: Path, arguments: argparse.Namespace) -> None:
    """Submits the sweep and waits until no job of it is left."""
    (folder / "resources.yaml").write_text(PROFILE.format(pack=arguments.pack))
    words = ["submit", arguments.sweep, "--size", arguments.size, "--cluster", "slurm"]
    words += ["--resources", str(folder / "resources.yaml")]
    words += ["--runs", str(arguments.runs), "--results", str(arguments.results)]
    environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "slurm.launch", *words], env=environment, check=True)
    eventually(lambda: not slurm.ask("squeue", "-h"), "all jobs over", patience=7200)


def trained(runs: Path, since: float) -> dict[str, dict[str, float]]:
    """By task, the seconds that the steps of each run took in it: of lives that began after `since`."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for folder in map(RunFolder, sorted(path.parent for path in runs.glob("*/metrics.jsonl"))):
        lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        for life in attempts.read(folder):
            if not life.job or life.started < since or life.ended is None:
                continue
            steps = [
                (after["images"] - before["images"]) / after["images_per_s"]
                for before, after in zip([{"images": 0}, *lines], lines, strict=False)
                if life.started <= after["time"] <= life.ended
            ]
            if steps:
                found[life.job][folder.path.name] = sum(steps)
    return found


def elapsed(slurm: MiniSlurm, task: str) -> float:
    """Seconds of a task, of all its lives."""
    answer = slurm.ask("sacct", "-n", "-X", "-D", "-P", "-j", task, "-o", "ElapsedRaw")
    return float(sum(map(int, answer.split())))


def document(arguments: argparse.Namespace, tasks: dict[str, dict[str, float]], took: dict[str, float]) -> str:
    """benchmarks/packing.md."""
    lines = [
        f"| {task} | {len(runs)} | {min(runs.values()):.0f} | {sum(runs.values()):.0f} | {took[task]:.0f} "
        f"| {took[task] / sum(runs.values()) - 1:.1%} |"
        for task, runs in sorted(tasks.items())
    ]
    training = sum(sum(runs.values()) for runs in tasks.values())
    return (
        f"""# What a packed sweep costs beside its training

`python benchmarks/packing.py {arguments.sweep} --size {arguments.size} --pack {arguments.pack}`, on a SLURM of this
machine ({os.cpu_count()} cores), two tasks at a time. A trunk is a run and its cool-down branches.

| task | runs | shortest, s of training | training, s | task, s | beside training |
|---|---|---|---|---|---|
"""
        + "\n".join(lines)
        + f"""

All tasks: {sum(took.values()):.0f} s for {training:.0f} s of training, {sum(took.values()) / training - 1:.1%} more; \
wanted: below 15 %.
"""
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP")
    parser.add_argument("--size", default="all")
    parser.add_argument("--pack", type=int, default=5, help="trunks a task (default: 5)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    if lacking := missing():
        print(f"needs {', '.join(lacking)}: `make test-cluster` installs them", file=sys.stderr)
        return 2
    started = time.time()
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "slurm") as slurm:
        launch(slurm, Path(folder), arguments)
        tasks = trained(arguments.runs, started)
        took = {task: elapsed(slurm, task) for task in tasks}
    if not tasks:
        print("nothing of this sweep is left to train", file=sys.stderr)
        return 2
    text = document(arguments, tasks, took)
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
