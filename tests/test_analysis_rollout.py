"""Held-out prediction: rollouts, the record of predictions, links from loss to metric."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.assemble import Refits, assemble
from analysis.fit import fit
from analysis.laws import law
from analysis.links import PUBLISHED_R, ceiling_band, join, link, pearson
from analysis.points import Points
from analysis.predictions import keep_record, register, rows_sha256
from analysis.rollout import on_common_rows, rollout, score
from analysis.simulate import chinchilla_points
from analysis.study import Choice, study
from analysis.table import InvalidTable, load

N = np.geomspace(1e6, 1e9, 8)
REFIT = Refits(Choice()).of(law("power-floor"))


def ladder(noise: float = 0.003, seed: int = 0) -> Points:
    p = chinchilla_points(N, np.full(8, 1e9), 0.0, np.random.default_rng(0))
    y = (1.0 + 60 * N**-0.3) * np.exp(noise * np.random.default_rng(seed).normal(size=8))
    return replace(p, y=y, group={"arm": "a"})


def test_rollout_never_sees_what_it_predicts() -> None:
    p = ladder()
    entries = rollout(p, REFIT, 0.95)
    assert [e["held_out"]["row"] for e in entries] == [4, 5, 6, 7]
    assert [e["n_runs"] for e in entries] == [4, 5, 6, 7]
    spoilt = replace(p, y=np.where(p.n == N[-1], 99.0, p.y))
    again = rollout(spoilt, REFIT, 0.95)
    assert again[-1]["predicted"] == entries[-1]["predicted"] and not again[-1]["covered"]


def test_rollout_intervals_cover() -> None:
    scores = [score(rollout(ladder(seed=s), REFIT, 0.95)) for s in range(25)]
    found = [s for s in scores if s]
    share = sum(s["covered"] for s in found) / sum(s["n"] for s in found)
    assert 0.88 <= share <= 1.0


def test_rollout_tells_a_wrong_law_from_a_right_one() -> None:
    p = ladder(0.001)
    right, wrong = (score(rollout(p, Refits(Choice()).of(law(k)), 0.95)) for k in ("power-floor", "power"))
    assert right and wrong and right["rms_relative_error"] < 0.5 * wrong["rms_relative_error"]


def test_laws_are_compared_on_the_rows_that_all_were_asked_for() -> None:
    """A law that needs fewer rungs is asked of smaller, easier or harder ones: those count for none."""
    p = ladder()
    long, short = rollout(p, REFIT, 0.95), rollout(p, REFIT, 0.95)[2:]
    spoilt = [{**e, "relative_error": 9.0} for e in long[:2]] + long[2:]
    both = on_common_rows([spoilt, short], "n")
    assert both[0] == both[1] == score(short) and both[0] and both[0]["n"] == 2
    # one rung: no rival itself, and the others keep theirs
    assert on_common_rows([long, short[1:]], "n") == [score(long), None]
    assert on_common_rows([long[:2], short], "n") == [None, None]


def test_predictions_are_registered_once_and_scored_later(tmp_path: Path) -> None:
    path, full = tmp_path / "predictions.json", ladder()
    below = full.take(full.n < N[-1])
    planned = [{"n": float(N[-1]), "d": 1e9, "c": 6e18}]
    first = keep_record(path, register(below, REFIT, 0.95, planned), [below], "t")
    waiting = [p for p in first["predictions"] if p["covered"] is None]
    assert len(waiting) == 1 and waiting[0]["target"]["n"] == N[-1]
    assert waiting[0]["rows_sha256"] == rows_sha256(below)
    second = keep_record(path, register(full, REFIT, 0.95), [full], "t")
    scored = [p for p in second["predictions"] if p["target"]["n"] == N[-1]]
    assert all(p["measured"] == full.y[-1] and p["covered"] for p in scored)
    assert len(scored) == 1 and second["calibration"] == {"scored": 2, "targets": 2, "covered": 2, "level": 0.95}
    assert json.loads(path.read_text()) == second


def test_a_registered_prediction_is_never_rewritten(tmp_path: Path) -> None:
    path, p = tmp_path / "predictions.json", ladder()
    entries = register(p, REFIT, 0.95)
    keep_record(path, entries, [p], "t")
    changed = [{**e, "predicted": -1.0} for e in entries]
    assert keep_record(path, changed, [p], "t")["predictions"][0]["predicted"] == pytest.approx(entries[0]["predicted"])


def test_the_hash_is_of_the_rows_used_alone() -> None:
    p = ladder()
    below = register(p, REFIT, 0.95)[0]
    spoilt = replace(p, y=np.where(p.n == N[-1], 9.0, p.y))
    assert register(spoilt, REFIT, 0.95)[0] == below
    moved = replace(p, y=np.where(p.n == N[0], 9.0, p.y))
    assert register(moved, REFIT, 0.95)[0]["rows_sha256"] != below["rows_sha256"]


def test_the_record_says_how_predictions_fared_day_by_day(tmp_path: Path) -> None:
    path, full = tmp_path / "predictions.json", ladder()
    below = full.take(full.n < N[-1])
    planned = [{"n": float(N[-1]), "d": 1e9, "c": 6e18}]
    keep_record(path, register(below, REFIT, 0.95, planned), [below], "t", "2030-01-01T10:00:00Z")
    missed = replace(full, y=np.where(full.n == N[-1], 9.0, full.y))
    record = keep_record(path, [], [missed], "t", "2030-01-03T10:00:00Z")
    assert [(d["date"], d["scored"], d["covered"], d["in_advance"]) for d in record["history"]] == [
        ("2030-01-01", 1, 1, 0), ("2030-01-03", 1, 0, 1),
    ]  # fmt: skip
    last = record["history"][-1]
    assert (last["covered_so_far"], last["scored_so_far"]) == (1, 2)
    again = keep_record(path, [], [missed], "t", "2030-02-01T10:00:00Z")
    assert again["history"] == record["history"], "a date never moves"


def test_a_prediction_is_scored_once_and_by_its_own_unit_and_protocol(tmp_path: Path) -> None:
    path, full = tmp_path / "predictions.json", replace(ladder(), units=np.full(8, "nats"), protocols=np.full(8, "p1"))
    below = full.take(full.n < N[-1])
    planned = [{"n": float(N[-1]), "d": 1e9, "c": 6e18}]
    keep_record(path, register(below, REFIT, 0.95, planned), [below], "first")
    for other in (replace(full, units=np.full(8, "bits")), replace(full, protocols=np.full(8, "p2"))):
        waiting = keep_record(path, [], [other], "other")["predictions"]
        assert [p["covered"] for p in waiting if p["target"]["n"] == N[-1]] == [None]
    right = keep_record(path, [], [full], "second")
    assert [p["scored_by"] for p in right["predictions"]] == ["first", "second"]
    elsewhere = replace(full, y=9.0 * full.y)
    assert keep_record(path, [], [elsewhere], "third") == right, "another sweep's run of that size is not its run"


def test_a_target_counts_once_by_the_latest_prediction_made_before_it_was_scored(tmp_path: Path) -> None:
    path, full = tmp_path / "predictions.json", ladder()
    target = {"n": float(N[-1]), "d": 1e9, "c": 6e18}
    below = full.take(full.n < N[-1])
    # the first of three predictions of one run misses it; the last comes after the run
    for day, used in ((1, below.take(below.n > N[0])), (2, below)):
        entries = [e for e in register(used, REFIT, 0.95, [target]) if e["target"] == target]
        wrong = [{**e, "interval": [0.0, 0.1]} for e in entries] if day == 1 else entries
        keep_record(path, wrong, [], "t", f"2030-01-0{day}T10:00:00Z")
    keep_record(path, [], [full], "t", "2030-01-03T10:00:00Z")
    late = [{**e, "rows_sha256": "late", "interval": [0.0, 0.1]} for e in register(below, REFIT, 0.95, [target])]
    late = [e for e in late if e["target"] == target]
    record = keep_record(path, late, [full], "t", "2030-01-04T10:00:00Z")
    assert record["calibration"] == {"scored": 3, "targets": 1, "covered": 1, "level": 0.95}
    assert [(d["scored"], d["covered"], d["in_advance"]) for d in record["history"]] == [(1, 1, 1)]


def test_a_record_of_an_older_version_is_read_and_its_scores_stand(tmp_path: Path) -> None:
    """As it was before units, protocols and tables were kept with a score."""
    path, full = tmp_path / "predictions.json", ladder()
    keep_record(path, register(full, REFIT, 0.95), [full], "t", "2029-01-01T10:00:00Z")
    old = json.loads(path.read_text())
    for entry in old["predictions"]:
        for name in ("unit", "protocol", "scored_by", "scored_at"):
            del entry[name]
    path.write_text(json.dumps({"version": 1, "predictions": old["predictions"]}))
    record = keep_record(path, [], [replace(full, y=9.0 * full.y)], "u", "2030-01-01T10:00:00Z")
    assert [p["measured"] for p in record["predictions"]] == [full.y[-1]]
    assert record["history"][0]["date"] == "2029-01-01" and record["calibration"]["targets"] == 1


def test_a_foreign_record_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "predictions.json").write_text("[]")
    with pytest.raises(InvalidTable, match="UNREADABLE_RECORD"):
        keep_record(tmp_path / "predictions.json", [], [], "t")


def scores(loss: Points, ceiling: float = 1.0) -> Points:
    y = ceiling / (1 + np.exp(4 * (loss.y - 1.4)))
    return replace(loss, metric="geneval", kind="score", y=y, se=np.full(8, 0.01))


def test_link_errors_come_from_held_out_rungs() -> None:
    loss = ladder(0.0)
    bent = replace(loss, metric="fd", kind="distance", y=3 + 40 * (loss.y - 1) ** 2)
    found = link(loss, bent, REFIT, 0.95)
    assert (
        found is not None and found["error_held_out"] > found["error_in_sample"] and found["error_chained"] is not None
    )
    straight = replace(loss, metric="fd", kind="distance", y=3 + 40 * (loss.y - 1))
    line = link(loss, straight, REFIT, 0.95)
    assert line is not None and line["slope"] == pytest.approx(40) and line["error_held_out"] < 1e-9
    assert line["pearson"][0] == pytest.approx(1) and line["published_r"] == PUBLISHED_R["fd"]


def test_links_join_rows_that_carry_both() -> None:
    loss = ladder()
    some = scores(loss).take(np.array([1, 3, 4, 7]))
    joined = join(loss, some)
    np.testing.assert_allclose(joined.loss, loss.y[[1, 3, 4, 7]])
    assert link(loss, some.take(np.array([0, 1])), REFIT, 0.95) is None


def test_pearson_interval_is_fishers() -> None:
    x = np.arange(10.0)
    y = x + np.array([1, -1] * 5)
    r, low, high = pearson(x, y, 0.95) or (0, 0, 0)
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.arctanh(high) - np.arctanh(r) == pytest.approx(1.959964 / np.sqrt(7))
    assert low < r < high and pearson(x[:3], y[:3], 0.95) is None


def test_ceilings_bracket_a_bounded_score() -> None:
    p = scores(ladder(), 0.8)
    found = ceiling_band(p, lambda chosen, points: fit(chosen, points))
    assert [c["ceiling"] for c in found] == [1.0, 0.8]
    assert found[0]["mean"][-1] > found[1]["mean"][-1]
    assert found[1]["mean"][-1] < 0.8


def test_a_ladder_whose_largest_size_lacks_data_is_judged_at_the_data_that_all_sizes_have(tmp_path: Path) -> None:
    """The smaller sizes alone share more data, at another loss: of those rows a law is no guess of the largest size."""
    n, sizes = N[2:], len(N) - 2
    loss = 1.0 + 60 * n**-0.3
    frame = pd.DataFrame({
        "token_kind": "discrete", "order": "random", "seed": 0, "val_loss_unit": "nats/token",
        "run_id": [f"r{i}" for i in range(2 * sizes - 1)],
        "params_total": np.append(n, n[:-1]), "images": np.repeat([1e6, 2e6], [sizes, sizes - 1]),
        "val_loss": np.append(loss, 0.5 * loss[:-1]), "val_loss_se": 1e-4,
        "geneval": np.append(0.5 - loss / 10, 0.9 - loss[:-1] / 10), "geneval_se": 1e-3,
    })  # fmt: skip
    frame["train_flops"] = 6 * frame["params_total"] * frame["images"]
    frame.to_csv(tmp_path / "runs.csv", index=False)
    planned = {**frame.iloc[0].to_dict(), "run_id": "p", "params_total": 4 * n[-1], "train_flops": 24e6 * n[-1]}
    rows = [planned, {**planned, "run_id": "q", "images": 2e6}]
    doc = assemble(study(load(tmp_path / "runs.csv"), Choice()), tmp_path / "predictions.json", rows)
    asked = [e for f in doc["fits"] if f["metric"] == "val_loss" and f["law"] == "power-floor" for e in f["rollout"]]
    assert asked and all(abs(e["relative_error"]) < 0.01 for e in asked if e["n_runs"] > 3)
    (line,) = doc["links"]
    assert line["error_chained"] < 0.01
    told = [p["target"] for p in doc["predictions"]["predictions"] if p["metric"] == "val_loss"]
    assert [(t["n"], t["d"]) for t in told] == [(n[-1], 1e6), (4 * n[-1], 1e6)]
