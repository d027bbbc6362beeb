"""An MLflow experiment as a table that the law fitter reads.

    python -m fluidscale.export_mlflow local --out table.csv
    python -m fluidscale.export_mlflow local --out table.csv --tracking-uri http://host:5000

Runs that were mirrored carry their record, so their table is the one that collecting gives, digit for digit. Runs of
other programs give their parameters and the last value of each metric, a column each; name those to the fitter, e.g.
`python analysis/fit_laws.py table.csv --n params --d tokens --metric loss`. Runs that did not finish are named, never
dropped in silence.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fluidscale.record import table_csv, table_row, varying, write_atomic
from fluidscale.spec import InvalidInput
from fluidscale.valid import run_spec_from_json


def table(runs: list[dict[str, Any]], experiment: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of finished runs, and who was left out with the reason. `runs` as `tracking.experiment_runs` gives them."""
    specs = [run_spec_from_json(run["spec"], run["name"]) for run in runs if run["spec"] and run["record"]]
    varied = varying(specs)
    rows, left = [], []
    for run in runs:
        if run["record"]:
            row = table_row(run["record"], experiment, varied.get(run["record"]["run_id"], {}))
        elif run["state"] == "FINISHED" and run["metrics"] and not run["spec"]:
            row = {"run_id": run["name"], **run["params"], **run["metrics"]}
        else:
            left.append(f"{run['name']}: {run['state'].lower()}, without a record")
            continue
        rows.append(row)
    return rows, left


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.export_mlflow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", metavar="EXPERIMENT", help="its name, for mirrored runs that of their sweep")
    parser.add_argument("--out", type=Path, required=True, metavar="TABLE.csv", help="the table to write")
    parser.add_argument(
        "--tracking-uri", help="MLflow store; default: $MLFLOW_TRACKING_URI, else runs/mlflow/mlflow.db"
    )
    arguments = parser.parse_args(argv)
    try:
        from fluidscale.train.tracking import experiment_runs

        rows, left = table(experiment_runs(arguments.experiment, arguments.tracking_uri), arguments.experiment)
        if not rows:
            raise InvalidInput(f"experiment {arguments.experiment}: no finished run ({len(left)} unfinished)")
        write_atomic(arguments.out, table_csv(rows))
    except (InvalidInput, OSError) as error:
        print(f"export_mlflow: {error}", file=sys.stderr)
        return 2
    for line in left:
        print(f"left out {line}", file=sys.stderr)
    print(f"{arguments.out}: {len(rows)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
