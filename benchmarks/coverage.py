"""Do nominal 95 % intervals cover? Simulated tables from Chinchilla's law, fitted under the objective that ships.

python benchmarks/coverage.py              # 600 replicates a row; writes benchmarks/coverage.md

Finished rows are kept in build/coverage.jsonl, under the code they were made with: a command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from analysis.document import code_version  # noqa: E402
from analysis.fit import NO_SEEDS, Fit, SeedVariance, fit  # noqa: E402
from analysis.intervals import allocation_exponent, parameter_intervals, predict  # noqa: E402
from analysis.laws import law  # noqa: E402
from analysis.noise import seed_variance  # noqa: E402
from analysis.points import Points  # noqa: E402
from analysis.simulate import CHINCHILLA, chinchilla_points, grid, trunk_points  # noqa: E402
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


@dataclass(frozen=True)
class Job:
    """One row of the table. `seeds` 0: every run a trunk of its own; else trunks of that many seeds a size.

    `others` arms, each of two seeds a size, lend their seed variance.
    """

    sizes: int
    ratios: int
    noise: float
    objective: str = "huber-log"
    seeds: int = 0
    others: int = 0

    @property
    def kind(self) -> str:
        if not self.seeds:
            return "independent"
        kind = "one trunk a size" if self.seeds == 1 else f"{self.seeds} seeds a size"
        return kind + (", 2 seeds in the other arms" if self.others else "")

    def points(self, rng: np.random.Generator) -> tuple[Points, SeedVariance]:
        """A table, and what its replicates and those of the other arms show."""
        if not self.seeds:
            return chinchilla_points(*grid(self.sizes, self.ratios), self.noise, rng), NO_SEEDS
        own = trunk_points(self.sizes, self.ratios, self.seeds, self.noise, rng)
        arms = [trunk_points(self.sizes, self.ratios, 2, self.noise, rng) for _ in range(self.others)]
        return own, seed_variance([own, *arms])


def kept(path: Path, job: Job, replicates: int) -> tuple[list[float], float]:
    """A row as `path` has it, else made and added to `path`."""
    key = {"code": code_version(), "replicates": replicates, **asdict(job)}
    for line in path.read_text().splitlines() if path.exists() else ():
        found = json.loads(line)
        if found["key"] == key:
            return found["cover"], found["width"]
    cover, width = row(job, replicates)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps({"key": key, "cover": cover.tolist(), "width": width}) + "\n")
    return cover.tolist(), width


def row(job: Job, replicates: int) -> tuple[np.ndarray, float]:
    """Coverage of each quantity over the replicates, and the median half-width of alpha's interval."""
    rng = np.random.default_rng(7)
    hits, widths = [], []
    for _ in range(replicates):
        points, seeds = job.points(rng)
        fitted = fit(law("chinchilla"), points, Objective(job.objective), thorough=False, seeds=seeds)
        held, width = covered(fitted, job.noise * (2**0.5 if job.seeds else 1.0), rng)
        hits.append(held)
        widths.append(width)
    return np.mean(hits, axis=0), float(np.median(widths))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--replicates", type=int, default=600)
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = p.parse_args()
    start, lines, store = time.process_time(), [], ROOT / "build/coverage.jsonl"
    plain = [Job(6, r, s, o) for o in ("huber-log", "lse-log") for r in (2, 4) for s in (0.003, 0.01)]
    seeded = [(1, 0), (2, 0), (3, 0), (1, 3)]
    trunks = [Job(6, r, s, seeds=k, others=o) for k, o in seeded for r in (2, 4) for s in (0.003, 0.01)]
    for job in (*plain, *trunks, Job(8, 4, 0.003, seeds=1)):
        cover, width = kept(store, job, args.replicates)
        cells = " | ".join(f"{c:.3f}" for c in cover)
        shape = f"{job.sizes} x {job.ratios} | {job.noise:.1%} | {job.objective} | {job.kind}"
        lines.append(f"| {shape} | {cells} | {width:.3f} |")
        print(lines[-1], flush=True)
    head = " | ".join(WHAT)
    text = (
        f"""# Coverage of nominal 95 % intervals

`python benchmarks/coverage.py --replicates {args.replicates}`: Chinchilla's law (alpha .34, beta .28), 1e8 to 1e10
parameters, 2 or 4 ratios D/N a size; Gauss-Newton t intervals as shipped (unweighted Jacobian, Huber's efficiency
corrected). L is asked at 10 x the largest compute. Rows of one trunk share an error as large as a run's own, so a
new run varies by 1.4 times the noise named. "2 seeds in the other arms": the arm itself has one seed, and three arms
like it lend their seed variance. The standard error of a coverage of .95 is
{(0.95 * 0.05 / args.replicates) ** 0.5:.3f}.

| sizes x ratios | noise | objective | rows | {head} | half-width of alpha |
|---|---|---|---|{"---|" * (len(WHAT) + 1)}
"""
        + "\n".join(lines)
        + f"\n\n{time.process_time() - start:.0f} s of CPU, rows kept from before not counted.\n"
    )
    args.out.write_text(text)


if __name__ == "__main__":
    main()
