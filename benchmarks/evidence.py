"""What the committed evidence cost: device-hours of the runs behind results/, each run counted once.

    python benchmarks/evidence.py

A run's hours are those of its training and its evaluation on one CPU core, or as one of several runs on a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent.parent / "results"
ON_GPU = ("icons_short", "icons_ladder")


def main() -> int:
    tables = {path.parent.name: pd.read_csv(path) for path in sorted(RESULTS.glob("*/runs.csv"))}
    runs = pd.concat([table[["run_id", "gpu_hours"]].assign(sweep=name) for name, table in tables.items()])
    runs["device"] = runs["sweep"].isin(ON_GPU).map({True: "GPU", False: "core"})
    once = runs.drop_duplicates("run_id")
    print("| sweep | runs | of them in no table above | hours of those | device |\n|---|---|---|---|---|")
    for name, table in tables.items():
        new = once[once["sweep"] == name]
        device = "GPU" if name in ON_GPU else "core"
        print(f"| {name} | {len(table)} | {len(new)} | {new['gpu_hours'].sum():.2f} | {device} |")
    print(
        "\n"
        + ", ".join(
            f"{hours:.2f} {device}-hours" for device, hours in once.groupby("device")["gpu_hours"].sum().items()
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
