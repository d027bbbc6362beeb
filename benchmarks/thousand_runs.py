"""How long a user waits for the launcher over a thousand runs: on a real SLURM that this script starts.

python benchmarks/thousand_runs.py        writes benchmarks/thousand_runs.md
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from mini_slurm import MiniSlurm, cluster, missing  # noqa: E402

SWEEP = f"""
extends: {ROOT / "sweeps" / "smoke"}
sizes: [50K]
arms: all
seeds: {list(range(250))}
images: [4096]
"""
# Nothing may start: a thousand tasks would.
PROFILE = "slurm: {device: cpu, threads: 1, precision: 32-true, partition: high, minutes: 30, memory_gb: 0}\n"
WANTED = {"submit": 10.0, "status": 3.0, "submit again, nothing to do": 10.0, "cancel": 10.0}


def seconds(slurm: MiniSlurm, folder: Path, command: str) -> float:
    words = [command, str(folder / "many.yaml"), "--cluster", "slurm", "--resources", str(folder / "resources.yaml")]
    words += ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "slurm.launch", *words], env=slurm.environment, check=True, stdout=subprocess.DEVNULL
    )
    return time.monotonic() - started


def main() -> int:
    if lacking := missing():
        print(f"needs {', '.join(lacking)}: `make test-cluster` installs them", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name, cluster(Path(name) / "slurm") as slurm:
        folder = Path(name)
        (folder / "many.yaml").write_text(SWEEP)
        (folder / "resources.yaml").write_text(PROFILE)
        slurm.ask("scontrol", "update", "PartitionName=high", "State=DOWN")
        took = {what: seconds(slurm, folder, what.partition(" ")[0]) for what in list(WANTED)[:3]}
        queued = len(slurm.ask("squeue", "-h", "-r", "--name=many").splitlines())
        took["cancel"] = seconds(slurm, folder, "cancel")
    lines = [f"| {what} | {took[what]:.1f} s | {limit:g} s |" for what, limit in WANTED.items()]
    text = (
        f"""# A thousand runs on SLURM

`python benchmarks/thousand_runs.py`, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: wall time of each command,
start of Python included; {queued} tasks were in the queue after the second submission.

| command | took | wanted below |
|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
