"""Do nominal 95 % intervals cover? Simulated tables from Chinchilla's law, fitted under the objective that ships.

python benchmarks/coverage.py              # 600 replicates a row; writes benchmarks/coverage.md
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from analysis.fit import Fit, fit  # noqa: E402
from analysis.intervals import allocation_exponent, parameter_intervals, predict  # noqa: E402
from analysis.laws import law  # noqa: E402
from analysis.points import Points  # noqa: E402
from analysis.simulate import CHINCHILLA, chinchilla_points, grid  # noqa: E402
from analysis.solver import Objective  # noqa: E402

WHAT = ("alpha", "beta", "allocation", "L at 10x", "new run at 10x")


def covered(fitted: Fit, noise: float, rng: np.random.Generator) -> tuple[list[bool], float]:
    """Whether each interval holds its truth, and the half-width of alpha's."""
    t = CHINCHILLA
    intervals = parameter_intervals(fitted)
    share = allocation_exponent(fitted)
    assert share is not None
    reach = 10**0.5
    n, d = float(fitted.points.n.max() * reach), float(fitted.points.d.max() * reach)
    said = predict(fitted, n=n, d=d)
    truth = t["E"] + t["A"] * n ** -t["alpha"] + t["B"] * d ** -t["beta"]
    new = truth * np.exp(noise * rng.normal())
    held = [low <= t[name] <= high for name, (low, high) in intervals.items() if name in ("alpha", "beta")]
    held.append(share[1] <= t["beta"] / (t["alpha"] + t["beta"]) <= share[2])
    held += [said.low <= truth <= said.high, said.run_low <= new <= said.run_high]
    return held, (intervals["alpha"][1] - intervals["alpha"][0]) / 2


def trunks(points: Points, noise: float, ratios: int, rng: np.random.Generator) -> Points:
    """The same table as cool-down branches: every size one trunk, with an error of its own as large as a run's."""
    cluster = np.repeat(np.arange(len(points) // ratios), ratios)
    shared = noise * rng.normal(size=cluster.max() + 1)[cluster]
    return Points(**{**points.__dict__, "y": points.y * np.exp(shared), "cluster": cluster})


def row(
    sizes: int, ratios: int, noise: float, objective: str, branched: bool, replicates: int
) -> tuple[np.ndarray, float]:
    """Coverage of each quantity over the replicates, and the median half-width of alpha's interval."""
    rng = np.random.default_rng(7)
    n, d = grid(sizes, ratios)
    hits, widths = [], []
    for _ in range(replicates):
        points = chinchilla_points(n, d, noise, rng)
        if branched:
            points = trunks(points, noise, ratios, rng)
        fitted = fit(law("chinchilla"), points, Objective(objective), thorough=False)
        held, width = covered(fitted, noise * (2**0.5 if branched else 1.0), rng)
        hits.append(held)
        widths.append(width)
    return np.mean(hits, axis=0), float(np.median(widths))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--replicates", type=int, default=600)
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = p.parse_args()
    start, lines = time.process_time(), []
    jobs = [(6, r, s, o, False) for o in ("huber-log", "lse-log") for r in (2, 4) for s in (0.003, 0.01)]
    jobs += [(6, 4, s, "huber-log", True) for s in (0.003, 0.01)] + [(8, 4, 0.003, "huber-log", True)]
    for sizes, ratios, noise, objective, branched in jobs:
        cover, width = row(sizes, ratios, noise, objective, branched, args.replicates)
        cells = " | ".join(f"{c:.3f}" for c in cover)
        kind = "one trunk a size" if branched else "independent"
        lines.append(f"| {sizes} x {ratios} | {noise:.1%} | {objective} | {kind} | {cells} | {width:.3f} |")
        print(lines[-1], flush=True)
    head = " | ".join(WHAT)
    text = (
        f"""# Coverage of nominal 95 % intervals

`python benchmarks/coverage.py --replicates {args.replicates}`: Chinchilla's law (alpha .34, beta .28), 1e8 to 1e10
parameters, 2 or 4 ratios D/N a size; Gauss-Newton t intervals as shipped (unweighted Jacobian, Huber's efficiency
corrected). L is asked at 10 x the largest compute. With one trunk a size, all rows of a size share an error as
large as a run's own. The standard error of a coverage of .95 is {(0.95 * 0.05 / args.replicates) ** 0.5:.3f}.

| sizes x ratios | noise | objective | rows | {head} | half-width of alpha |
|---|---|---|---|{"---|" * (len(WHAT) + 1)}
"""
        + "\n".join(lines)
        + f"\n\n{time.process_time() - start:.0f} s of CPU.\n"
    )
    args.out.write_text(text)


if __name__ == "__main__":
    main()
