"""How fast are the fits, in CPU seconds on one thread?

OPENBLAS_NUM_THREADS=1 python benchmarks/fit_speed.py        # writes benchmarks/fit_speed.md
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from analysis.bootstrap import refit  # noqa: E402
from analysis.fit import fit  # noqa: E402
from analysis.laws import law  # noqa: E402
from analysis.points import Points  # noqa: E402
from analysis.simulate import chinchilla_points  # noqa: E402
from analysis.solver import Objective  # noqa: E402

REFITS = 4000


def table(sizes: int, data: int) -> Points:
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 1e10, sizes), np.geomspace(2e9, 2e11, data)))
    return chinchilla_points(n, d, 0.01, np.random.default_rng(0))


def seconds(job: Callable[[], object]) -> float:
    """CPU seconds, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        job()
        best = min(best, time.process_time() - start)
    return best


def refits(points: Points, objective: str) -> float:
    fitted = fit(law("chinchilla"), points, Objective(objective))
    counts = np.random.default_rng(1).multinomial(len(points), np.full(len(points), 1 / len(points)), size=REFITS)
    return seconds(lambda: refit(fitted, points.y / fitted.scale, counts.astype(float)))


def command(*options: str) -> float:
    """Wall seconds of the default command on a copy of results/local, imports included; the median of three."""
    took = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(
                ROOT / "results/local", Path(folder) / "local", ignore=shutil.ignore_patterns("report")
            )
            start = time.perf_counter()
            order = [sys.executable, ROOT / "analysis/fit_laws.py", copy, *options]
            subprocess.run(order, check=True, capture_output=True)
            took.append(time.perf_counter() - start)
    return sorted(took)[1]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = p.parse_args()
    points, many = table(20, 12), table(100, 100)
    rows = [
        (f"{REFITS} Huber refits, 5 parameters, 240 points", refits(points, "huber-log"), 5.0, "CPU"),
        (f"{REFITS} least-squares refits, 240 points", refits(points, "lse-log"), 1.0, "CPU"),
        (
            "multi-start point fit with variable projection, 240 points",
            seconds(lambda: fit(law("chinchilla"), points)),
            1.0,
            "CPU",
        ),
        ("the same on 10,000 points", seconds(lambda: fit(law("chinchilla"), many)), 5.0, "CPU"),
        ("fit_laws.py results/local --no-report", command("--no-report"), 10.0, "wall"),
        ("fit_laws.py results/local with its report", command(), 45.0, "wall"),
    ]
    lines = [f"| {what} | {took:.2f} s {clock} | {limit:g} s |" for what, took, limit, clock in rows]
    text = (
        f"""# Speed of the fits

`OPENBLAS_NUM_THREADS=1 python benchmarks/fit_speed.py`, Python {platform.python_version()}, numpy {np.__version__},
{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} while it ran; the best of three; of the commands the median.

| what | took | wanted below |
|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
