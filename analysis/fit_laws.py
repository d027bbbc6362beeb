"""Command line: any table of finished runs -> laws.json and a report.

    python analysis/fit_laws.py                                   # results/local/runs.csv, all metrics, all groups
    python analysis/fit_laws.py points.csv --n params --d tokens --metric loss --law chinchilla --out fits
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from analysis.document import document, plain, write_json  # noqa: E402
from analysis.laws import LAW_NAMES  # noqa: E402
from analysis.solver import HUBER_DELTA, OBJECTIVES  # noqa: E402
from analysis.study import Choice, study  # noqa: E402
from analysis.table import InvalidTable, load  # noqa: E402

EXAMPLES = """examples:
  python analysis/fit_laws.py                            our own table, results/local/runs.csv, with its report
  python analysis/fit_laws.py results/icons/runs.csv --out results/icons
  python analysis/fit_laws.py points.csv --n params --d tokens --metric loss --law chinchilla --json
  python analysis/fit_laws.py points.csv --n N --metric acc --se acc_se --law logit --c flops

Laws: power A N^-a | power-floor E + A N^-a | compute E + A C^-a | chinchilla E + A N^-a + B D^-b | kaplan | broken | logit.
Exit code 2 with one line [CODE] when a table cannot answer."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fit_laws.py", description="Fits scaling laws to a table of runs and writes laws.json and a report.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("table", nargs="?", type=Path, help="CSV, parquet, JSON lines or a folder of runs (results/local/runs.csv)")
    p.add_argument("--n", metavar="COLUMN", help="parameters (params_total)")
    p.add_argument("--d", metavar="COLUMN", help="data size (images)")
    p.add_argument("--c", metavar="COLUMN", help="training FLOPs (train_flops)")
    p.add_argument("--metric", action="append", default=[], metavar="COLUMN", help="metric to fit; repeatable (all known ones)")
    p.add_argument("--se", metavar="COLUMN", help="standard error of the metric (METRIC_se)")
    p.add_argument("--group", metavar="A,B", help="columns that make a group, each fitted alone (token_kind,order)")
    p.add_argument("--cluster", metavar="COLUMN", help="rows that share it are not independent (trunk_id)")
    p.add_argument("--law", action="append", default=[], choices=LAW_NAMES, help="law; repeatable (each metric's own)")
    p.add_argument("--objective", choices=OBJECTIVES, help="what is minimised (huber-log; scores: quasi-binomial)")
    p.add_argument("--delta", type=float, default=HUBER_DELTA, help=f"Huber threshold on log residuals ({HUBER_DELTA})")
    p.add_argument("--floor", type=float, metavar="E", help="fix the floor E in the metric's units (free; FD: measured)")
    p.add_argument("--level", type=float, default=0.95, help="level of all intervals (0.95)")
    p.add_argument("--out", type=Path, help="folder for laws.json and report/ (the table's own)")
    p.add_argument("--no-report", action="store_true", help="laws.json only")
    p.add_argument("--json", action="store_true", help="print laws.json instead of the summary")
    return p


def summary(doc: dict) -> str:
    """One line a fit: exponents with intervals, or why there are none."""
    lines = []
    for f in doc["fits"]:
        names = [k for k in f["intervals"] if k in ("alpha", "beta", "alpha_N", "alpha_D", "slope")]
        values = "  ".join(
            f"{k} {f['params'][k]:.4f} [{f['intervals'][k][0]:.4f}, {f['intervals'][k][1]:.4f}]" for k in names
        )
        codes = " ".join(w["code"] for w in f["warnings"])
        group = "-".join(f["group"].values()) or "all"
        lines.append(f"{group:20} {f['metric']:22} {f['law']:12} {','.join(f['axes']):4} {values}  {codes}".rstrip())
    for r in doc["refused"]:
        group = "-".join(r["group"].values()) or "all"
        lines.append(f"{group:20} {r['metric']:22} {r['law'] or '':12} refused [{r['code']}] {r['message']}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict:
    """Reads, fits, writes laws.json and the report; returns the document."""
    table_path = args.table or ROOT / "results/local/runs.csv"
    group = None if args.group is None else tuple(filter(None, args.group.split(",")))
    table = load(table_path, n=args.n, d=args.d, c=args.c, group=group, cluster=args.cluster, se=args.se)
    choice = Choice(tuple(args.law), tuple(args.metric), args.objective, args.delta, args.floor, args.level)
    doc = plain(document(study(table, choice)))
    folder = args.out or (table_path if table_path.is_dir() else table_path.parent)
    write_json(folder / "laws.json", doc)
    if not args.no_report:
        from analysis.report import build

        build(folder / "laws.json", table_path.parent / "samples")
    return doc


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    start = time.perf_counter()
    try:
        if not 0.5 <= args.level < 1:
            raise InvalidTable("BAD_LEVEL", f"--level {args.level} is not in [0.5, 1)")
        doc = run(args)
    except InvalidTable as error:
        print(f"fit_laws: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fit_laws: [UNWRITABLE] {error.filename}: {error.strerror}: choose another --out", file=sys.stderr)
        return 2
    print(json.dumps(doc, indent=1) if args.json else summary(doc))
    print(f"{len(doc['fits'])} fits in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
