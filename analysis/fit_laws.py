"""Command line: any table of finished runs -> laws.json, predictions.json and a report.

python analysis/fit_laws.py                                   # results/local/runs.csv, all metrics, all groups
python analysis/fit_laws.py points.csv --n params --d tokens --metric loss --law chinchilla --out fits
python analysis/fit_laws.py results/local results/icons       # what changed from one result to another
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# the matrices here are 5 x 5: threads would only wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from analysis import answers, curves, images  # noqa: E402
from analysis.assemble import assemble  # noqa: E402
from analysis.bootstrap import METHODS  # noqa: E402
from analysis.changes import changes, in_words  # noqa: E402
from analysis.document import plain, write_json  # noqa: E402
from analysis.laws import LAW_NAMES  # noqa: E402
from analysis.names import name_of  # noqa: E402
from analysis.published import published  # noqa: E402
from analysis.refusals import gathered  # noqa: E402
from analysis.solver import HUBER_DELTA, OBJECTIVES  # noqa: E402
from analysis.study import Choice, Study, study  # noqa: E402
from analysis.table import AXES, OWN_COLUMNS, InvalidTable, Table, load  # noqa: E402

EXAMPLES = """examples:
  python analysis/fit_laws.py                            our own table, results/local/runs.csv, with its report
  python analysis/fit_laws.py results/icons/runs.csv --out results/icons
  python analysis/fit_laws.py points.csv --n params --d tokens --metric loss --law chinchilla --json
  python analysis/fit_laws.py points.csv --c flops --metric acc --se acc_se --law logit
  python analysis/fit_laws.py results/local results/icons    what changed, with intervals

laws: power A N^-a | power-floor E + A N^-a | compute E + A C^-a | chinchilla E + A N^-a + B D^-b | kaplan |
kaplan-floor (E more) | broken (one break) | logit, logit-joint (bounded scores, along one axis or in N and D). A table
that cannot answer: one line with a [CODE], exit code 2. per_prompt.parquet and per_image.parquet beside the table pair
runs prompt by prompt and image by image; per_step.parquet has their learning curves."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fit_laws.py", description="Fits scaling laws to a table of runs and writes laws.json and a report.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("table", nargs="*", type=Path, metavar="TABLE",
                   help="CSV, parquet, JSON lines, a folder of runs or of results; two are compared")  # fmt: skip
    columns = p.add_argument_group("columns (default: the project's own)")
    columns.add_argument("--n", metavar="COLUMN", help="parameters (params_total)")
    columns.add_argument("--d", metavar="COLUMN", help="data size (images)")
    columns.add_argument("--c", metavar="COLUMN", help="training FLOPs (train_flops)")
    columns.add_argument("--metric", action="append", default=[], metavar="COLUMN", help="repeatable (all known ones)")
    columns.add_argument("--se", metavar="COLUMN", help="standard error of the metric (METRIC_se)")
    columns.add_argument("--group", metavar="A,B", help="columns whose values are fitted apart (token_kind,order)")
    columns.add_argument("--cluster", metavar="COLUMN", help="rows that share it are not independent (trunk_id)")
    how = p.add_argument_group("fit")
    how.add_argument("--law", action="append", default=[], choices=LAW_NAMES, help="repeatable (each metric's own)")
    how.add_argument(
        "--objective", choices=OBJECTIVES, help="huber-log; scores: quasi-binomial; lse: raw scale, any sign (val_nll)"
    )
    how.add_argument(
        "--delta", type=float, default=HUBER_DELTA, help=f"Huber threshold on log residuals ({HUBER_DELTA})"
    )
    how.add_argument(
        "--penalty", type=float, default=1.0, metavar="K", help="weight of over-estimated points (1: none)"
    )
    how.add_argument("--floor", type=float, metavar="E", help="fix the floor E, in the metric's units (FD: measured)")
    how.add_argument("--interval", choices=METHODS, default=METHODS[0], help="how parameters get their intervals")
    how.add_argument(
        "--predict", action="append", default=[], metavar="n=3e10[,d=..]", help="ask each law there; repeatable"
    )
    how.add_argument("--level", type=float, default=0.95, help="level of all intervals (0.95)")
    where = p.add_argument_group("output")
    where.add_argument("--out", type=Path, metavar="DIR", help="folder of laws.json and report/ (the table's own)")
    where.add_argument(
        "--runs", type=Path, metavar="DIR", help="run folders for the report's links (runs/ up the path)"
    )
    where.add_argument(
        "--plan", type=Path, metavar="JSON", help="plan --json: its larger runs are predicted in advance"
    )
    where.add_argument(
        "--overlay", action="store_true", help="draw Fluid's published values beside ours (own protocol)"
    )
    where.add_argument("--no-report", action="store_true", help="laws.json and predictions.json only")
    where.add_argument("--json", action="store_true", help="print laws.json instead of the summary")
    return p


def summary(doc: dict[str, Any]) -> str:
    """One line a fit: exponents with intervals, or why there are none."""
    lines = []
    for f in doc["fits"]:
        names = [k for k in f["intervals"] if k in ("alpha", "beta", "alpha_N", "alpha_D", "delta", "slope")]
        ends = {k: f["intervals"][k] for k in names}
        values = "  ".join(f"{k} {f['params'][k]:#.4g} [{ends[k][0]:#.4g}, {ends[k][1]:#.4g}]" for k in names)
        codes = " ".join(w["code"] for w in f["warnings"])
        for said in f["forecasts"]:
            at = ", ".join(f"{k.upper()} = {v:.4g}" for k, v in said["at"].items())
            values += (
                f"\n{'':20} at {at}: {said['mean']:.4g}, law [{said['low']:.4g}, {said['high']:.4g}], new run "
                f"[{said['run_low']:.4g}, {said['run_high']:.4g}], {said['decades']:.2f} decades beyond "
                f"{said['n_runs']} points"
            )
        where = f"{name_of(f['group']):20} {f['metric']:22} {f['law']:12} {','.join(f['axes']):4}"
        lines.append(f"{where} {values}  {codes}".rstrip())
    lines += [f"refused [{code}] {reason}: {where}" for code, reason, where in gathered(doc)]
    lines += [f"{v['verdict']:12} {v['claim']}" for v in doc["verdicts"]]
    return "\n".join([*lines, *_left_out(doc["table"])])


def _left_out(table: dict[str, Any]) -> list[str]:
    """One line on the rows that were left out, of all metrics or of one, the commonest reason first; none without."""
    rows = {(e["reason"], e["row"]) for e in table["excluded"]}
    if not rows:
        return []
    counts = Counter(reason for reason, _ in sorted(rows)).most_common()
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts)
    return [f"{len({row for _, row in rows})} of {table['n_rows']} rows left out: {reasons}"]


def _table_path(path: Path) -> Path:
    """A results folder stands for the table in it; a folder of runs for itself."""
    for name in ("runs.csv", "runs.parquet"):
        if (path / name).is_file():
            return path / name
    return path


def _load(args: argparse.Namespace, path: Path) -> Table:
    group = None if args.group is None else tuple(filter(None, args.group.split(",")))
    table = load(path, n=args.n, d=args.d, c=args.c, group=group, cluster=args.cluster, se=args.se)
    return replace(table, answers=answers.beside(path), images=images.beside(path), curves=curves.beside(path))


def _choice(args: argparse.Namespace) -> Choice:
    places = tuple(_place(text) for text in args.predict)
    laws, metrics = tuple(args.law), tuple(args.metric)
    return Choice(
        laws, metrics, args.objective, args.delta, args.floor, args.level, args.interval, places, args.penalty
    )


def _place(text: str) -> dict[str, float]:
    """n=3e10,d=2e11 -> {"n": 3e10, "d": 2e11}."""
    try:
        place = {key.strip(): float(value) for key, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise InvalidTable("BAD_PLACE", f"--predict {text}: write n=3e10 or n=3e10,d=2e11") from error
    if not set(place) <= set(AXES) or any(not 0 < v < float("inf") for v in place.values()):
        raise InvalidTable("BAD_PLACE", f"--predict {text}: positive values of {', '.join(AXES)} only")
    return place


def _runs_beside(table: Path) -> Path:
    """runs/ of the project that the table's results lie in; the table itself where that is a folder of runs."""
    if table.is_dir():
        return table
    for parent in table.resolve().parents:
        if (parent / "runs").is_dir():
            return parent / "runs"
    return table.parent / "runs"


def _planned(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    try:
        runs = list(json.loads(path.read_text())["runs"])
        for run in runs:
            if not all(0 < float(run[key]) < float("inf") for key in OWN_COLUMNS.values()):
                raise ValueError(f"a run's {', '.join(OWN_COLUMNS.values())} are not positive")
        return runs
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InvalidTable(
            "UNREADABLE_PLAN", f"{path} is no plan: write one with `make plan` --json ({error!r})"
        ) from error


def fit_table(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Reads, fits, writes laws.json, predictions.json and the report; returns the document."""
    table_path = _table_path(path)
    folder = args.out or (table_path if table_path.is_dir() else table_path.parent)
    result = study(_load(args, table_path), _choice(args))
    runs = args.runs or _runs_beside(table_path)
    doc = plain(assemble(result, folder / "predictions.json", _planned(args.plan)))
    if runs.is_dir():
        doc["runs"]["folder"] = os.path.relpath(runs, folder / "report")
    if args.overlay:
        doc["overlay"] = plain(published())
    write_json(folder / "laws.json", doc)
    if not args.no_report:
        # drawing costs more to import than fitting: only where a report is wanted
        from analysis.report import build

        build(folder / "laws.json", table_path.parent / "samples")
    return doc


def compare_tables(args: argparse.Namespace, before: Path, after: Path) -> dict[str, Any]:
    """What changed from one table to another; written to --out where given."""
    studies: list[Study] = [study(_load(args, _table_path(p)), _choice(args)) for p in (before, after)]
    found = plain(changes(studies[0], studies[1], args.level))
    if args.out:
        write_json(args.out / "changes.json", found)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    start = time.perf_counter()
    paths = args.table or [ROOT / "results/local/runs.csv"]
    try:
        if len(paths) > 2:
            raise InvalidTable("TOO_MANY_TABLES", f"{len(paths)} tables: give one to fit or two to compare")
        found = compare_tables(args, *paths) if len(paths) == 2 else fit_table(args, paths[0])
    except InvalidTable as error:
        print(f"fit_laws: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fit_laws: [UNWRITABLE] {error.filename}: {error.strerror}: choose another --out", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(in_words(found) if len(paths) == 2 else summary(found))
    print(f"done in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
