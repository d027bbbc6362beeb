"""What the number of drawn images does to a Fréchet distance, and what FID_inf takes back.

    python benchmarks/fid_inf.py --width 64 --repeats 40

Simulated Gaussian features of known distance: real ones N(0, I), drawn ones N(shift, scale^2 I), the reference exact,
so that all that is left is the bias of the drawn side. Prints the table of fid_inf.md.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from fluidscale.evaluate.distances import Moments, frechet, frechet_unbiased, jackknife, moments

SIZES = (250, 500, 1000, 2000, 4000)
# Of the drawn features: far enough from the reference to have a distance, near enough for its bias to matter.
SHIFT, SCALE = 0.1, 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="features")
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    width, started = arguments.width, time.process_time()
    reference = Moments(np.zeros(width), np.eye(width), 10**9)
    truth = width * (SHIFT**2 + (SCALE - 1) ** 2)
    print(f"true distance {truth:.3f}; {width} features, {arguments.repeats} repeats\n")
    print("| n | FD at n | bias | FID_inf | bias | sd of FID_inf | stated SE |\n|---|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for n in SIZES:
        draws = [SHIFT + SCALE * rng.normal(size=(n, width)) for _ in range(arguments.repeats)]
        plain = np.array([frechet(moments(d), reference) for d in draws])
        removed = np.array([frechet_unbiased(d, reference) for d in draws])
        stated = [jackknife(d, lambda f: frechet_unbiased(f, reference)) for d in draws[:10]]
        cells = (plain.mean(), plain.mean() - truth, removed.mean(), removed.mean() - truth, removed.std(ddof=1))
        print(f"| {n} | " + " | ".join(f"{value:.3f}" for value in cells) + f" | {np.mean(stated):.3f} |", flush=True)
    print(f"\n{time.process_time() - started:.0f} s of CPU.")


if __name__ == "__main__":
    main()
