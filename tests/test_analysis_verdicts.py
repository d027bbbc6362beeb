"""The published claims on tables where the answer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.points import select
from analysis.published import TABLE
from analysis.simulate import TRUTHS, chinchilla_points, ladder
from analysis.study import Choice, Study, study
from analysis.table import load, prepare
from analysis.verdicts import CLAIMS, bend_of, verdicts, weaker


def judged(frame: pd.DataFrame) -> dict[int, dict]:
    result: Study = study(prepare(frame, "", "frame"), Choice())
    return {v["number"]: v for v in verdicts(result.points, result.fits, 0.95)}


@pytest.fixture(scope="module")
def base() -> pd.DataFrame:
    return ladder(seeds=(0, 1), noise=0.002)


def test_every_claim_is_judged_with_its_rows(base: pd.DataFrame) -> None:
    found = judged(base)
    assert sorted(found) == list(range(1, 12)) == [n for n, *_ in CLAIMS]
    for v in found.values():
        assert v["verdict"] in ("holds", "reversed", "undecided", "not measured")
        if v["verdict"] != "not measured":
            assert v["effect"] is not None and v["evidence"]["rows"] and v["interval"][0] < v["interval"][1]
            assert max(v["evidence"]["rows"]) < len(base)
    assert found[10]["verdict"] == "not measured"  # no table of ours has a 10.5B model


def test_a_known_truth_gets_its_verdict(base: pd.DataFrame) -> None:
    found = judged(base)
    # every simulated loss falls with N, to a floor that bends it
    assert found[1]["verdict"] == "undecided" and "is bent in the logs" in found[1]["evidence"]["text"]
    assert found[4]["verdict"] == "holds"  # continuous has the lower distance at the largest size
    assert found[7]["verdict"] == "holds"  # random: higher loss, better images
    assert found[5]["verdict"] == "reversed"  # random scores below raster in the simulated truth
    assert TRUTHS["continuous", "random"].score < TRUTHS["continuous", "raster"].score


def test_turning_the_truth_around_turns_the_verdict_around(base: pd.DataFrame) -> None:
    swapped = base.assign(token_kind=base["token_kind"].map({"continuous": "discrete", "discrete": "continuous"}))
    before, after = judged(base), judged(swapped)
    assert (before[4]["verdict"], after[4]["verdict"]) == ("holds", "reversed")
    assert (before[6]["verdict"], after[6]["verdict"]) == ("reversed", "holds")


def test_rising_loss_reverses_the_first_claim(base: pd.DataFrame) -> None:
    upside = base.assign(val_loss=5.0 - pd.to_numeric(base["val_loss"]))
    assert judged(upside)[1]["verdict"] == "reversed"


def straight(base: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Losses and distances that are power laws of N and nothing else, with noise."""
    rng, n = np.random.default_rng(seed), pd.to_numeric(base["params_total"])
    loss = 2.0 * (n / 1e6) ** -0.3 * np.exp(0.01 * rng.normal(size=len(base)))
    full = base["fd"] != ""
    fd = (5.0 * (n / 1e6) ** -0.4 * np.exp(0.03 * rng.normal(size=len(base)))).astype(object).where(full, "")
    odds = np.exp(-0.3 * (n / 1e6) ** -0.4 + 0.005 * rng.normal(size=len(base)))
    return base.assign(val_loss=loss, fd=fd, fd_floor="", fd_real_floor="", geneval=odds.astype(object).where(full, ""))


def test_a_power_law_is_straight_in_the_logs_and_only_that_makes_the_first_claim_hold(base: pd.DataFrame) -> None:
    found = judged(straight(base, 0))[1]
    assert found["verdict"] == "holds" and found["evidence"]["text"].count("bend") == 4


def test_bends_are_looked_for_in_all_ladders_at_once() -> None:
    """Eight straight ladders of five sizes: one bend in twenty at 95 % each made claim 2 hold in every third table."""
    rng, shown = np.random.default_rng(0), 0
    n = np.geomspace(46e3, 950e3, 5)
    for _ in range(300):
        ladders = [chinchilla_points(n, np.full(5, 1e5), 0.0, rng) for _ in range(8)]
        noisy = [replace(p, y=n**-0.4 * np.exp(0.1 * rng.normal(size=5))) for p in ladders]
        found = [bend_of(p, 8, 0.95) for p in noisy]
        shown += any(b is not None and (b[1] > 0 or b[2] < 0) for b in found)
    assert shown / 300 < 0.05 + 3 * 0.0126


def test_the_weakest_effect_is_the_one_nearest_to_its_own_error() -> None:
    small_but_sure, large_but_vague = (0.02, 0.018, 0.022), (4.0, -1.0, 9.0)
    assert weaker(weaker(None, small_but_sure), large_but_vague) == large_but_vague
    assert weaker(large_but_vague, small_but_sure) == large_but_vague


def test_a_missing_arm_is_not_measured(base: pd.DataFrame) -> None:
    partial = base[base["order"] == "random"]
    found = judged(partial)
    assert found[1]["verdict"] == "not measured" and found[5]["verdict"] == "not measured"


def test_what_is_undecided_names_the_effect_that_would_have_been_seen(base: pd.DataFrame) -> None:
    equal = ladder(noise=0.002)
    full, rng = equal["fd"] != "", np.random.default_rng(0)
    found = {}
    for spread in (0.05, 0.2):
        noise = np.exp(spread * rng.normal(size=full.sum()))
        noisy = equal.astype({"fd": object, "fd_se": object})
        noisy.loc[full, "fd"], noisy.loc[full, "fd_se"] = 5.0 * noise, 5.0 * spread
        found[spread] = judged(noisy)
    for v in found[0.2].values():
        if v["verdict"] == "undecided":
            assert v["detectable"] > 0
    assert found[0.2][4]["verdict"] == "undecided"
    # four times the noise hides an effect about four times as large
    assert found[0.2][4]["detectable"] > 2 * (found[0.05][4]["detectable"] or 0)


def test_noise_leaves_it_undecided() -> None:
    equal = ladder(noise=0.002)
    rng = np.random.default_rng(0)
    full = equal["fd"] != ""
    equal.loc[full, "fd"] = 5.0 * np.exp(0.1 * rng.normal(size=full.sum()))
    equal.loc[full, "fd_se"] = 0.5
    found = judged(equal)
    assert found[4]["verdict"] == "undecided"


def test_losses_of_unlike_units_are_never_contrasted(base: pd.DataFrame) -> None:
    text = judged(base)[7]["evidence"]["text"]
    assert "continuous-random − continuous-raster in val_loss" in text
    assert "continuous-random − discrete" not in text.split("fd")[0]


def test_tables_of_others_have_no_verdicts(base: pd.DataFrame) -> None:
    one_arm = base[(base["order"] == "random") & (base["token_kind"] == "discrete")]
    table = prepare(one_arm, "", "frame", n="params_total", d="images")
    result = study(table, Choice(metrics=("val_loss",), laws=("power-floor",)))
    assert verdicts(result.points, result.fits, 0.95) == []


def test_the_published_table_speaks_to_the_tenth_claim() -> None:
    table = load(TABLE, n="params_total", group=("token_kind", "order"))
    points = [select(table, group, rows, "geneval")[0] for group, rows in table.groups()]
    found = {v["number"]: v for v in verdicts(points, [], 0.95)}[10]
    assert found["verdict"] == "holds" and found["effect"] == pytest.approx(-0.01)
    sure = replace(points[0], se=np.full(5, 0.001))
    assert {v["number"]: v for v in verdicts([sure], [], 0.95)}[10]["verdict"] == "reversed"
