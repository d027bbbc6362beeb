"""How much of a long training is luck of rounding: the runs that two tables share, computed twice, beside their seeds.

    python benchmarks/rounding.py                     results/seeds, before captions were padded, and results/local

Of the shared runs at the largest number of images: the root mean square of the differences. Of the first table: the
standard deviation between seeds, pooled over arms and sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    p = argparse.ArgumentParser(description="Differences of runs computed twice, beside those of seeds.")
    p.add_argument("tables", nargs="*", type=Path, metavar="RESULTS", default=[RESULTS / "seeds", RESULTS / "local"])
    first, second = (pd.read_csv(folder / "runs.csv") for folder in p.parse_args().tables)
    first = first[first["images"] == first["images"].max()].assign(log_loss=lambda rows: np.log(rows["val_loss"]))
    both = first.merge(second.assign(log_loss=np.log(second["val_loss"])), on="run_id", suffixes=("", "_again"))
    for kind, runs in both.groupby("token_kind"):
        seeds = first[first["token_kind"] == kind].groupby(["order", "size"])
        for value in ("log_loss", "geneval"):
            again = float(np.sqrt(((runs[f"{value}_again"] - runs[value]) ** 2).mean()))
            between = float(np.sqrt(seeds[value].var(ddof=1).mean()))
            print(f"{kind:11s} {value:9s} computed twice {again:.4f} ({len(runs)} runs), between seeds {between:.4f}")


if __name__ == "__main__":
    main()
