"""Advice on next runs: its arithmetic, its gain, and sweep files that the planner accepts."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.advice import Candidate, Goal, _side, advise, price
from analysis.fit import fit
from analysis.information import half_widths
from analysis.intervals import parameter_intervals
from analysis.laws import law
from analysis.recommend import _trunks, blocks, main
from analysis.simulate import chinchilla_points, grid, ladder, trunk_points
from analysis.solver import Objective

ROOT = Path(__file__).parent.parent


def candidates(copies: int = 6) -> list[Candidate]:
    n, d = grid(6, 4)
    places = list(zip(n.tolist(), d.tolist(), range(24), strict=True))
    return [
        Candidate(f"{k}-{s}", "all", f"{k}-{s}", a, b, 6 * a * b, 6 * a * b, 1.0)
        for s in range(copies)
        for a, b, k in places
    ]


@pytest.fixture(scope="module")
def goal() -> Goal:
    points = chinchilla_points(*grid(6, 4), 0.005, np.random.default_rng(0))
    return Goal("exponent", (fit(law("chinchilla"), points),))


def test_advice_keeps_its_budget_and_beats_an_even_spread(goal: Goal) -> None:
    budget = 0.5 * float(goal.fits[0].points.c.sum())
    found = advise(goal, candidates(), budget)
    assert found.price <= budget and found.price == pytest.approx(price(found.chosen))
    assert found.after < found.even < found.before
    assert found.even / found.after > 1.3


def test_what_is_expected_before_is_what_was_fitted(goal: Goal) -> None:
    low, high = parameter_intervals(goal.fits[0])["alpha"]
    # the advice averages over draws of the parameters, and the inflation of Huber's estimator is left out of it
    assert advise(goal, candidates(), 1e30).before == pytest.approx((high - low) / 2, rel=0.35)


@pytest.fixture(scope="module")
def trunks() -> Goal:
    """A ladder of trunks that differ by as much as runs do, fitted by least squares."""
    points = trunk_points(6, 4, 2, 0.005, np.random.default_rng(0))
    return Goal("exponent", (fit(law("chinchilla"), points, Objective("lse-log")),))


def offers(goal: Goal) -> list[Candidate]:
    """A branch of the table's first trunk, two branches of a new one, and one of another arm, all at one place."""
    n, d = float(goal.fits[0].points.n[0]), float(goal.fits[0].points.d[0]) * 3
    arms = (("all", "#0"), ("all", "new"), ("all", "new"), ("other", "its"))
    return [Candidate(str(k), arm, trunk, n, d, 1.0, 1.0, 1.0) for k, (arm, trunk) in enumerate(arms)]


def test_what_lies_between_trunks_is_in_the_variance_as_in_the_fit_s(trunks: Goal) -> None:
    fitted = trunks.fits[0]
    assert fitted.between[0] > 0
    side = _side(fitted, trunks, offers(trunks), {}, np.random.default_rng(0))
    found = sum(variance[0] for variance, _ in side.parts())
    index = fitted.law.parameters.index("alpha")
    assert found == pytest.approx(fitted.covariance[index, index], rel=1e-3)


def test_each_candidate_s_worth_is_what_adding_it_gives(trunks: Goal) -> None:
    side = _side(trunks.fits[0], trunks, offers(trunks), {}, np.random.default_rng(0))
    side.add(1)
    said = half_widths(side.parts_with_each(), 0.95)
    for k in range(4):
        grown = side.copy()
        grown.add(k)
        assert half_widths(grown.parts(), 0.95) == pytest.approx(said[:, k], rel=1e-6)
    before = half_widths(side.parts(), 0.95)
    assert said[:, 3] == pytest.approx(before), "a run of another arm tells nothing"


@pytest.mark.parametrize("shared", [True, False])
def test_what_bought_runs_tell_is_what_refits_say(trunks: Goal, shared: bool) -> None:
    """Eight runs at the ladder's top, as branches of one trunk and as trunks: how far the law's value there strays."""
    points = trunks.fits[0].points
    place = {"n": float(points.n.max()), "d": float(points.d.max())}
    more = [Candidate(str(k), "all", "one" if shared else str(k), *place.values(), 1.0, 1.0, 1.0) for k in range(8)]
    goal = replace(trunks, kind="prediction", place=place)
    side = _side(goal.fits[0], goal, more, {}, np.random.default_rng(0))
    variance = [float(sum(v[0] for v, _ in side.parts()))]
    for k in range(8):
        side.add(k)
        variance.append(float(sum(v[0] for v, _ in side.parts())))
    values = [np.log(_value_with_eight(shared, place, np.random.default_rng(s))) for s in range(60)]
    # half of a run's variance is its trunk's: of eight branches it stays whole
    assert variance[-1] > 0.5 * variance[0] if shared else variance[-1] < 0.3 * variance[0]
    assert float(np.std(values)) == pytest.approx(np.sqrt(variance[-1]), rel=0.3)


def test_where_no_trunk_has_branches_half_is_taken_to_be_the_trunks() -> None:
    points = chinchilla_points(*grid(6, 4), 0.005, np.random.default_rng(0))
    goal = Goal("exponent", (fit(law("chinchilla"), points, Objective("lse-log")),))
    fitted, branches = goal.fits[0], offers(goal)
    for offered, share in ((branches, 0.5), (branches[:2], 0.0)):
        side = _side(fitted, goal, offered, {}, np.random.default_rng(0))
        assert side.between[0] == pytest.approx(share * fitted.within[0])
        whole = sum(variance[0] for variance, _ in side.parts())
        index = fitted.law.parameters.index("alpha")
        assert whole == pytest.approx(fitted.covariance[index, index], rel=1e-3)


def _value_with_eight(shared: bool, place: dict[str, float], rng: np.random.Generator) -> float:
    first = trunk_points(6, 4, 2, 0.005, rng)
    added = chinchilla_points(*(np.full(8, v) for v in place.values()), 0.005, rng)
    luck = np.full(8, rng.normal()) if shared else rng.normal(size=8)
    y = np.concatenate([first.y, added.y * np.exp(0.005 * luck)])
    axes = {k: np.concatenate([first.axis(k), added.axis(k)]) for k in ("n", "d", "c")}
    rows = np.arange(len(y))
    both = replace(first.take(np.zeros(len(y), int)), y=y, rows=rows, cluster=rows, **axes)
    return float(fit(law("chinchilla"), both, Objective("lse-log"), thorough=False).predict(**place)[0])


def test_a_larger_budget_never_does_worse(goal: Goal) -> None:
    total = float(goal.fits[0].points.c.sum())
    widths = [advise(goal, candidates(), share * total).after for share in (0.1, 0.3, 1.0)]
    assert widths[0] > widths[1] > widths[2]


def test_runs_of_one_trunk_share_its_price() -> None:
    rows = [Candidate(str(k), "a", "trunk", 1e6, 10.0**k, 0.0, 10.0**k, 0.25) for k in (3, 4, 5)]
    assert price(rows) == pytest.approx(1e5 + 0.25 * (1e4 + 1e3))
    assert price(rows[:1]) == pytest.approx(1e3)


def rows(*keys: tuple[str, str, str, int, int]) -> list[dict]:
    return [dict(zip(("token_kind", "order", "size", "seed", "images"), key, strict=True)) for key in keys]


def test_blocks_say_exactly_the_chosen_runs() -> None:
    block = [("discrete", "random", size, 1, images) for size in ("46K", "96K") for images in (100, 200)]
    chosen = rows(*block, ("discrete", "raster", "96K", 2, 100), ("discrete", "random", "46K", 2, 100))
    said = [
        (arm, size, seed, images)
        for b in blocks(chosen)
        for arm, size, seed, images in itertools.product(b["arms"], b["sizes"], b["seeds"], b["images"])
    ]
    wanted = [(f"{r['token_kind']}-{r['order']}", r["size"], r["seed"], r["images"]) for r in chosen]
    assert sorted(said) == sorted(wanted)
    assert {"sizes": ["46K", "96K"], "arms": ["discrete-random"], "seeds": [1], "images": [100, 200]} in blocks(chosen)


def test_rows_that_name_no_trunk_share_none() -> None:
    frame = pd.DataFrame({"_row": [3, 5, 7, 9], "trunk_id": ["a", "", None, float("nan")]})
    assert _trunks(frame) == {3: "a"} and _trunks(frame[["_row"]]) == {}


def plan_of(frame, path: Path) -> Path:
    names = ["run_id", "trunk_id", "branch_step", "steps", "sweep", "token_kind", "order", "size", "seed",
             "params_total", "images", "train_flops", "gpu_hours"]  # fmt: skip
    path.write_text(json.dumps({"runs": json.loads(frame[names].to_json(orient="records"))}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("advice")
    ladder().to_csv(out / "runs.csv", index=False)
    plan_of(ladder(seeds=(0, 1, 2, 3)), out / "plan.json")
    return out


@pytest.mark.parametrize("goal, arms", [("exponent", "continuous-random"), ("prediction", "discrete-raster"),
                                        ("comparison", "discrete-random,discrete-raster")])  # fmt: skip
def test_command_offers_only_new_runs_of_its_arms(
    goal: str, arms: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["--table", str(folder / "runs.csv"), "--plan", str(folder / "plan.json"), "--budget-flops", "1e14"]
    assert main([*command, "--goal", goal, "--arm", arms, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"] < found["before"] and found["price"] <= 1e14
    assert {f"{r['token_kind']}-{r['order']}" for r in found["runs"]} <= set(arms.split(","))
    assert all(r["seed"] > 0 for r in found["runs"])


def test_bad_requests_end_with_one_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    table = ["--table", str(folder / "runs.csv"), "--plan", str(folder / "plan.json")]
    cases = {
        "NOTHING_TO_BUY": [*table, "--budget-flops", "1"],
        "MIXED_UNITS": [
            *table,
            "--budget-flops",
            "1e14",
            "--goal",
            "comparison",
            "--arm",
            "continuous-random,discrete-random",
        ],
        "BAD_LEVEL": [*table, "--budget-flops", "1e14", "--level", "2"],
        "WRONG_ARMS": [*table, "--budget-flops", "1e14", "--goal", "comparison", "--arm", "discrete-random"],
        "NO_LAW": [*table, "--budget-flops", "1e14", "--arm", "nobody"],
        "NO_PLAN": [*table[:2], "--plan", str(folder / "none.json"), "--budget-flops", "1"],
        "UNREADABLE_PLAN": [*table[:2], "--plan", str(folder / "runs.csv"), "--budget-flops", "1"],
    }
    for code, command in cases.items():
        assert main(command) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and f"[{code}]" in lines[0]


def launch_plan(sweep: str | Path) -> list[dict]:
    command = [sys.executable, "-m", "slurm.launch", "plan", str(sweep), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["runs"]


def test_the_planner_accepts_the_advice(tmp_path: Path) -> None:
    """The whole chain on the real planner: its plan in, our sweep files out, their runs are those that were chosen."""
    offered = tmp_path / "offered.yaml"
    offered.write_text(f"extends: {ROOT / 'sweeps/local'}\nseeds: [0, 1, 2]\n")
    runs = launch_plan(offered)
    for r in runs:
        r["sweep"] = "local"
    (tmp_path / "plan.json").write_text(json.dumps({"runs": runs}))
    rng, table = np.random.default_rng(0), []
    for r in (r for r in runs if r["seed"] == 0):
        loss = 2.0 + 30 * r["params_total"] ** -0.3 + 50 * r["images"] ** -0.4
        table.append({**r, "val_loss": loss * np.exp(0.003 * rng.normal()), "val_loss_se": 0.001, "status": "done"})
    pd.DataFrame(table).to_csv(tmp_path / "runs.csv", index=False)
    budget = sum(r["train_flops"] for r in runs) / 20
    out = tmp_path / "next.yaml"
    files = ["--table", tmp_path / "runs.csv", "--plan", tmp_path / "plan.json", "--out", out]
    wish = ["--budget-flops", str(budget), "--arm", "discrete-raster", "--json"]
    command = [sys.executable, ROOT / "analysis/recommend.py", *files, *wish]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    planned = {
        (r["size"], r["token_kind"], r["order"], r["seed"], r["images"]) for f in found["files"] for r in launch_plan(f)
    }
    assert planned == {(r["size"], r["token_kind"], r["order"], r["seed"], r["images"]) for r in found["runs"]}
