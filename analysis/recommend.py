"""Command line: the next runs to buy, as a sweep file that the planner accepts.

python -m slurm.launch plan sweeps/local.yaml --json > plan.json
python analysis/recommend.py --table results/local/runs.csv --plan plan.json --budget-flops 1e14 --out sweeps/next.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from analysis.advice import GOALS, Advice, Candidate, Goal, advise  # noqa: E402
from analysis.allocation import allocation, cost_law  # noqa: E402
from analysis.document import plain, write, write_json  # noqa: E402
from analysis.fit import Fit  # noqa: E402
from analysis.study import Choice, Study, study  # noqa: E402
from analysis.table import EMPTY_CELLS, InvalidTable, load  # noqa: E402

EXAMPLES = """examples:
  python analysis/recommend.py --table results/local/runs.csv --plan plan.json --budget-flops 1e14
  python analysis/recommend.py --table results/local/runs.csv --plan plan.json --budget-gpu-hours 3 \\
      --goal comparison --arm continuous-random,discrete-random --metric fd --out sweeps/next.yaml

The plan lists what may be bought: plan a sweep with more seeds, sizes or data sizes than have been run, and this
chooses among its runs. Runs that the table already has are not offered again."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="recommend.py", description="Chooses the next runs: those that narrow one interval most for their price.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--table", type=Path, default=ROOT / "results/local/runs.csv", help="finished runs (results/local)")
    p.add_argument("--plan", type=Path, required=True, help="what may be bought and its price: plan --json")
    budget = p.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-flops", type=float, metavar="FLOPS", help="training FLOPs to spend")
    budget.add_argument("--budget-gpu-hours", type=float, metavar="HOURS", help="GPU-hours (core-hours) to spend")
    p.add_argument("--goal", choices=GOALS, default="exponent", help="the interval to narrow (exponent)")
    p.add_argument(
        "--arm", help="arm (two for a comparison), e.g. continuous-random (the one with the widest interval)"
    )
    p.add_argument("--metric", default="val_loss", help="metric whose law it is (val_loss)")
    p.add_argument("--parameter", choices=("alpha", "beta"), default="alpha", help="exponent to narrow (alpha)")
    p.add_argument("--at-compute", type=float, metavar="FLOPS", help="where to predict (10 x the largest measured)")
    p.add_argument("--level", type=float, default=0.95, help="level of the interval (0.95)")
    p.add_argument("--out", type=Path, help="sweep file to write; several are numbered where one cannot say it")
    p.add_argument("--json", action="store_true", help="print the choice as JSON")
    return p


def candidates(path: Path, done: set[str], by_hours: bool) -> tuple[list[Candidate], dict[str, dict[str, Any]]]:
    """The plan's runs that are not done yet, priced in FLOPs or GPU-hours, and their plan rows by run id."""
    try:
        rows = json.loads(path.read_text())["runs"]
        out = []
        for r in rows:
            share = (
                1.0 - float(r["branch_step"]) / float(r["steps"]) if r.get("branch_step") and r.get("steps") else 1.0
            )
            cost = float(r["gpu_hours"] if by_hours else r["train_flops"])
            trunk = str(r.get("trunk_id") or r["run_id"])
            arm = f"{r['token_kind']}-{r['order']}"
            place = (float(r["params_total"]), float(r["images"]), float(r["train_flops"]))
            out.append(Candidate(str(r["run_id"]), arm, trunk, *place, cost, share))
    except OSError as error:
        raise InvalidTable("NO_PLAN", f"{path}: {error.strerror}: write one with plan --json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidTable("UNREADABLE_PLAN", f"{path} is no plan: write one with plan --json ({error!r})") from error
    return [c for c in out if c.run_id not in done], {str(r["run_id"]): r for r in rows}


def _fit_of(result: Study, metric: str, arm: str) -> Fit:
    """The joint law where there is one, else the law in N."""
    mine = [f for f in result.fits if f.points.metric == metric and f.points.name == arm and f.law.axes[0] == "n"]
    mine = [f for f in mine if f.objective.logarithmic]
    if not mine:
        known = ", ".join(sorted({f.points.name for f in result.fits if f.points.metric == metric})) or "none"
        raise InvalidTable("NO_LAW", f"no law of {metric} for {arm}: the table carries it for {known}")
    return max(mine, key=lambda f: len(f.law.axes))


def _place(fit: Fit, compute: float | None) -> dict[str, float]:
    """Where a law is asked: the best split of the compute by the joint law, else the ladder continued in N."""
    top = int(np.argmax(fit.points.c))
    c = compute or 10 * float(fit.points.c[top])
    split = allocation(fit, 0.95)
    if split is None:
        return {"n": float(fit.points.n[top] * c / fit.points.c[top])}
    log_c, log_n = (np.log([b[k] for b in split["budgets"]]) for k in ("c", "n"))
    n = float(np.exp(np.interp(np.log(c), log_c, log_n)))
    # an optimum far outside the ladder is an artefact of a badly known exponent
    n = float(np.clip(n, fit.points.n.min(), fit.points.n.max() * 10))
    k, p = cost_law(fit)
    return {"n": n, "d": c / (k * n**p)}


def goal_of(args: argparse.Namespace, result: Study) -> Goal:
    """The goal that the options name."""
    arms = [a for a in (args.arm or "").split(",") if a]
    needed = 2 if args.goal == "comparison" else 1
    if not arms and needed == 1:
        fits = {f.points.name for f in result.fits if f.points.metric == args.metric and f.objective.logarithmic}
        widest = {a: _fit_of(result, args.metric, a) for a in fits}
        if not widest:
            raise InvalidTable("NO_LAW", f"no law of {args.metric} to improve: name another with --metric")
        arms = [max(widest, key=lambda a: widest[a].covariance.trace())]
    if len(arms) != needed:
        raise InvalidTable("WRONG_ARMS", f"goal {args.goal} takes {needed} arm(s), {len(arms)} given with --arm")
    fits = tuple(_fit_of(result, args.metric, arm) for arm in arms)
    if args.goal == "exponent" and args.parameter not in fits[0].law.parameters:
        message = f"law {fits[0].law.name} has no {args.parameter}: the table needs several data sizes"
        raise InvalidTable("NO_PARAMETER", message)
    if len({f.points.unit for f in fits}) > 1:
        units = " and ".join(f.points.unit for f in fits)
        raise InvalidTable("MIXED_UNITS", f"{args.metric} is in {units}: these arms cannot be compared by it")
    return Goal(args.goal, fits, args.parameter, _place(fits[0], args.at_compute), args.level)


def blocks(rows: Sequence[dict[str, Any]]) -> list[dict[str, list[Any]]]:
    """The rows as full products arms x sizes x seeds x images, which is what a sweep file can say."""
    images: dict[tuple[str, str, int], set[int]] = {}
    for r in rows:
        key = (f"{r['token_kind']}-{r['order']}", str(r["size"]), int(r["seed"]))
        images.setdefault(key, set()).add(int(r["images"]))
    merged: dict[tuple[tuple[Any, ...], ...], tuple[int, ...]] = {
        tuple((value,) for value in key): tuple(sorted(found)) for key, found in images.items()
    }
    for axis in (1, 2, 0):
        together: dict[Any, set[Any]] = {}
        for key, found in merged.items():
            together.setdefault((key[:axis], key[axis + 1 :], found), set()).update(key[axis])
        merged = {(*head, tuple(sorted(values)), *tail): found for (head, tail, found), values in together.items()}
    return [
        {"sizes": list(sizes), "arms": list(arms), "seeds": list(seeds), "images": list(found)}
        for (arms, sizes, seeds), found in merged.items()
    ]


def sweep_text(block: dict[str, list[Any]], parent: str, out: Path, remark: str) -> str:
    """A sweep file that extends the planned one and narrows it to the block."""
    sweeps = ROOT / "sweeps"
    base = parent if out.resolve().parent == sweeps else os.path.relpath(sweeps / parent, out.resolve().parent)
    lines = [f"# {remark}", f"extends: {base}"]
    lines += [f"{key}: {json.dumps(values)}" for key, values in block.items()]
    return "\n".join(lines) + "\n"


def _write_sweeps(args: argparse.Namespace, advice: Advice, rows: Sequence[dict[str, Any]]) -> list[Path]:
    parents = sorted({str(r["sweep"]) for r in rows})
    if len(parents) != 1:
        raise InvalidTable("MIXED_SWEEPS", f"the plan mixes sweeps {', '.join(parents)}: plan one")
    found = blocks(rows)
    remark = f"narrows the {args.goal} interval of {args.metric}: {advice.before:.4g} -> about {advice.after:.4g}"
    paths = []
    for i, block in enumerate(found, 1):
        path = args.out if len(found) == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
        write(path, sweep_text(block, parents[0], path, remark))
        paths.append(path)
    return paths


def _in_words(found: dict[str, Any]) -> str:
    unit = "GPU-hours" if found["price_in"] == "gpu_hours" else "FLOPs"
    lines = [f"{r['run_id']:45} {r['size']:>6} {r['images']:>9,} images  seed {r['seed']}" for r in found["runs"]]
    lines.append(f"{len(found['runs'])} runs for {found['price']:.4g} {unit}")
    lines.append(f"half-width of the {found['goal']} interval ({', '.join(found['arms'])}, {found['metric']}):")
    lines.append(f"  now {found['before']:.4g}, expected {found['after']:.4g}; an even spread: {found['even']:.4g}")
    return "\n".join([*lines, *(f"wrote {p}" for p in found["files"])])


def _trunks(frame: pd.DataFrame) -> dict[int, str]:
    """The trunk of each row that names one."""
    if "trunk_id" not in frame:
        return {}
    named = zip(frame["_row"].tolist(), map(str, frame["trunk_id"]), strict=True)
    return {row: trunk for row, trunk in named if trunk not in EMPTY_CELLS}


def recommend(args: argparse.Namespace) -> dict[str, Any]:
    """Chooses, writes the sweep files, notes the choice in the table's laws.json where there is one."""
    result = study(load(args.table), Choice(metrics=(args.metric,), level=args.level))
    goal = goal_of(args, result)
    done = set(result.table.frame["run_id"].astype(str)) if "run_id" in result.table.frame else set()
    by_hours = args.budget_gpu_hours is not None
    offered, rows = candidates(args.plan, done, by_hours)
    budget = args.budget_gpu_hours if by_hours else args.budget_flops
    advice = advise(goal, offered, budget, _trunks(result.table.frame))
    chosen = [rows[c.run_id] for c in advice.chosen]
    if not chosen:
        arms = " and ".join(f.points.name for f in goal.fits)
        message = f"none of the plan's {len(offered)} new runs of {arms} fits the budget: plan more seeds or sizes"
        raise InvalidTable("NOTHING_TO_BUY", message)
    keys = ("run_id", "size", "token_kind", "order", "seed", "images", "params_total", "train_flops")
    found = {
        "goal": args.goal, "metric": args.metric, "arms": [f.points.name for f in goal.fits],
        "law": goal.fits[0].law.name,
        "parameter": args.parameter if args.goal == "exponent" else None, "place": goal.place, "level": args.level,
        "before": advice.before, "after": advice.after, "even": advice.even, "price": advice.price,
        "price_in": "gpu_hours" if by_hours else "train_flops", "runs": [{k: r.get(k) for k in keys} for r in chosen],
    }  # fmt: skip
    found["files"] = [str(p) for p in _write_sweeps(args, advice, chosen)] if args.out else []
    laws = args.table.parent / "laws.json"
    if laws.is_file():
        write_json(laws, {**json.loads(laws.read_text()), "recommended_runs": [found]})
    return plain(found)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        found = recommend(args)
    except InvalidTable as error:
        print(f"recommend: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"recommend: [UNWRITABLE] {error.filename}: {error.strerror}: choose another --out", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if args.json else _in_words(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
