"""Does `recommend` beat an even spread? The same budget spent both ways, on truths it does not know.

python benchmarks/recommend.py            # 200 draws a truth; writes benchmarks/recommend.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from analysis.advice import Candidate, Goal, advise, even_spread  # noqa: E402
from analysis.fit import Fit, fit  # noqa: E402
from analysis.intervals import parameter_intervals, predict  # noqa: E402
from analysis.laws import Array, law  # noqa: E402
from analysis.points import Points  # noqa: E402

Truth = Callable[[Array, Array], Array]
SIZES = np.geomspace(1e8, 1e10, 6)
RATIOS = np.array([5.0, 20.0, 80.0])
NOISE = 0.005
SEEDS = 12
# twice what the first ladder cost: a second campaign
BUDGET = 2.0


def chinchilla(n: Array, d: Array) -> Array:
    """Hoffmann et al. 2022, approach 3."""
    return 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28


def shallow(n: Array, d: Array) -> Array:
    """A high floor and a slower fall with size, as small ladders of image models show."""
    return 2.4 + 60.0 * n**-0.22 + 2000.0 * d**-0.36


def kaplan(n: Array, d: Array) -> Array:
    """Kaplan et al. 2020, eq. 1.5 with the constants of eqs. 1.1 and 1.2: not in the fitted family."""
    return ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095


TRUTHS: dict[str, Truth] = {
    "chinchilla": chinchilla,
    "shallow, high floor": shallow,
    "kaplan (not in the family)": kaplan,
}


def _points(n: Array, d: Array, truth: Truth, rng: np.random.Generator) -> Points:
    y = truth(n, d) * np.exp(NOISE * rng.normal(size=len(n)))
    blank, rows, label = np.full(len(n), np.nan), np.arange(len(n)), np.full(len(n), "")
    return Points({}, "loss", "loss", label, label, rows, n, d, 6 * n * d, y, blank, blank, rows, np.zeros(len(n), int))


def _candidates() -> list[Candidate]:
    out = []
    for seed in range(SEEDS):
        for n in SIZES:
            for ratio in RATIOS:
                run = f"{n:.3g}-{ratio:g}-{seed}"
                out.append(
                    Candidate(run, "all", run, float(n), float(n * ratio), 6 * n * n * ratio, 6 * n * n * ratio, 1.0)
                )
    return out


def _half_width(fitted: Fit, goal: Goal) -> float:
    if goal.kind == "exponent":
        low, high = parameter_intervals(fitted)[goal.parameter]
        return (high - low) / 2
    said = predict(fitted, **(goal.place or {}))
    return float(np.log(said.high / said.low) / 2)


def trial(truth: Truth, kind: str, rng: np.random.Generator) -> tuple[float, float]:
    """Half-widths after the recommended runs and after an even spread, both measured by refitting."""
    n = np.repeat(SIZES, len(RATIOS))
    d = n * np.tile(RATIOS, len(SIZES))
    first = _points(n, d, truth, rng)
    start = fit(law("chinchilla"), first, thorough=False)
    place = {"n": float(SIZES.max() * 10**0.5), "d": float(SIZES.max() * 20 * 10**0.5)}
    goal = Goal(kind, (start,), "alpha", place)
    offered, budget = _candidates(), BUDGET * float(first.c.sum())
    chosen = advise(goal, offered, budget).chosen
    even = [offered[k] for k in even_spread(offered, budget)]
    widths = []
    for runs in (chosen, even):
        more_n, more_d = (np.array([getattr(c, key) for c in runs]) for key in ("n", "d"))
        more = _points(more_n, more_d, truth, rng)
        both = _points(np.concatenate([n, more_n]), np.concatenate([d, more_d]), truth, rng)
        y = np.concatenate([first.y, more.y])
        both = Points(**{**both.__dict__, "y": y})
        widths.append(_half_width(fit(law("chinchilla"), both, thorough=False), goal))
    return widths[0], widths[1]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--draws", type=int, default=200)
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = p.parse_args()
    start, rows = time.process_time(), []
    for name, truth in TRUTHS.items():
        for kind in ("exponent", "prediction"):
            rng = np.random.default_rng(1)
            widths = np.array([trial(truth, kind, rng) for _ in range(args.draws)])
            ratio = widths[:, 1] / widths[:, 0]
            low, middle, high = np.percentile(ratio, [10, 50, 90])
            own, other = np.median(widths, axis=0)
            rows.append(f"| {name} | {kind} | {own:.4g} | {other:.4g} | {middle:.2f} | {low:.2f} to {high:.2f} |")
            print(rows[-1], flush=True)
    text = (
        f"""# Does the advice beat an even spread?

`python benchmarks/recommend.py --draws {args.draws}`: 6 sizes x 3 ratios at {NOISE:.1%} noise, then
{BUDGET:g} times that ladder's price spent twice: as `recommend` says, and in whole passes over the ladder. Half-widths
are of the refitted 95 % interval of alpha, and of the log of the loss at 10 x the largest compute; the ratio is
that of the even spread's to the advice's.

| truth | goal | advice | even spread | median ratio | 10 to 90 % |
|---|---|---|---|---|---|
"""
        + "\n".join(rows)
        + f"\n\n{time.process_time() - start:.0f} s of CPU.\n"
    )
    args.out.write_text(text)


if __name__ == "__main__":
    main()
