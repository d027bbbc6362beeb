"""Where along the noise a denoising head fails: the error of its clean token at nine levels, by objective.

    make sweep SWEEP=objective
    python benchmarks/noise_levels.py runs --sweep objective        the table of benchmarks/noise_levels.md

Reads eval/val_nll.json of finished runs. At log-SNR s the error of the predicted noise, in units of its variance, is
exp(s) times that of the clean token it stands for: an error of 1 there is what a head makes that knows only that
z-scored tokens have variance 1, and 1 / (1 + exp(s)) is what the best guess from the noisy token alone makes if tokens
were unit normal. Exit code 2 without such runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from fluidscale.record import read_json
from fluidscale.sweep import load_sweep


def clean_errors(noise_errors: list[float], log_snr: list[float]) -> list[float]:
    """Mean squared error of the clean token at each level, in units of a token's variance."""
    return [error * math.exp(-s) for error, s in zip(noise_errors, log_snr, strict=True)]


def table(runs: Path, sweep: str) -> list[str]:
    """Rows of a Markdown table, an arm and objective each."""
    rows, levels = [], None
    for spec in load_sweep(sweep).runs:
        found = read_json(runs / spec.id / "eval" / "val_nll.json")
        if found is None or spec.model.head is None:
            continue
        by_level = found["extra"]["by_log_snr"]
        if levels is None:
            levels = by_level["log_snr"]
            rows += [f"| arm | objective | {' | '.join(f'{s:g}' for s in levels)} |", f"|{'---|' * (len(levels) + 2)}"]
            guess = [1 / (1 + math.exp(s)) for s in levels]
            rows.append(f"| unit normal tokens | best guess | {' | '.join(f'{v:.3g}' for v in guess)} |")
        errors = clean_errors(by_level["mean"], levels)
        rows.append(f"| {spec.arm} | {spec.model.head.objective} | {' | '.join(f'{v:.3g}' for v in errors)} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="folder of runs; default: runs")
    parser.add_argument("--sweep", default="objective", help="whose runs; default: %(default)s")
    arguments = parser.parse_args()
    rows = table(arguments.runs, arguments.sweep)
    if not rows:
        print(f"{arguments.runs}: no run of {arguments.sweep} has eval/val_nll.json; make sweep SWEEP=objective first")
        return 2
    print(f"`python benchmarks/noise_levels.py --sweep {arguments.sweep}`: error of the clean token by log-SNR\n")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
