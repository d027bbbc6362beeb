"""What `make plan` says of a finished sweep, beside what its runs took: steps, and core-hours of the whole.

    python benchmarks/prices.py                                   results/local/runs.csv at the profile `cpu`
    python benchmarks/prices.py --sweep more_images --profile cpu

Exit code 2 without such a table or profile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_sweep
from slurm.placement import Machine, load_profile
from slurm.plan import make_plan

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> int:
    p = argparse.ArgumentParser(description="Planned against measured: tokens per second and core-hours of a sweep.")
    p.add_argument("--sweep", default="local", help="with its table under results/ (local)")
    p.add_argument("--profile", default="cpu", help="row of slurm/resources.yaml (cpu)")
    args = p.parse_args()
    try:
        table = pd.read_csv(RESULTS / args.sweep / "runs.csv").set_index("run_id")
        plan = make_plan(load_sweep(args.sweep), Machine(load_profile(args.profile), 1))
    except (OSError, InvalidInput) as error:
        print(f"prices: {error}", file=sys.stderr)
        return 2
    runs = [run for run in plan.runs if run.spec.id in table.index]
    measured = table.loc[[run.spec.id for run in runs], "tokens_per_s"]
    ratios = pd.Series([run.cost.tokens_per_s for run in runs], measured.index) / measured
    print("tokens per second, planned over measured: " + ", ".join(f"{q:.2f}" for q in ratios.quantile([0, 0.5, 1])))
    print(f"(least, median, most of {len(runs)} runs)")
    print(f"device-hours: {plan.worker_hours:.2f} planned, {table['gpu_hours'].sum():.2f} measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
