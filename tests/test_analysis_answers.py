"""Results prompt by prompt: the file beside a table, and differences between arms on the same prompts and seeds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.answers import FILE, Answers, beside, of_metric, paired
from analysis.compare import contrast
from analysis.crossings import crossings_by_seed
from analysis.fit import fit
from analysis.laws import law
from analysis.points import Points, select
from analysis.simulate import chinchilla_points
from analysis.table import InvalidTable, prepare

TAGS = np.repeat(["counting", "two_object"], 60)
PROMPTS = np.array([f"p{k:03d}" for k in range(120)])


def asked(rate: np.ndarray, images: int, rng: np.random.Generator) -> Answers:
    """A run whose prompts are right at `rate` (P,)."""
    return Answers(TAGS, PROMPTS, rng.binomial(images, rate) / images, np.full(120, float(images)))


def rates(rng: np.random.Generator) -> np.ndarray:
    """Prompts differ far more from each other than arms do."""
    return rng.uniform(0.1, 0.8, size=120)


def test_pairing_over_prompts_takes_the_prompts_own_spread_out() -> None:
    rng = np.random.default_rng(0)
    rate = rates(rng)
    found = paired([asked(rate + 0.1, 8, rng)], [asked(rate, 8, rng)])
    assert found is not None and found.effect == pytest.approx(0.1, abs=3 * found.error)
    assert found.error < 0.85 * found.unpaired
    # drawing anew is all that separates two arms alike: its variance is the paired error's
    assert found.drawing is not None and found.error**2 == pytest.approx(found.drawing, rel=0.4)
    assert paired([asked(rate, 1, rng)], [asked(rate, 1, rng)]).drawing is None  # type: ignore[union-attr]


def test_the_paired_error_is_the_spread_over_repetitions() -> None:
    rng = np.random.default_rng(1)
    effects, errors = [], []
    for _ in range(300):
        rate = rates(rng)
        found = paired([asked(rate + 0.05, 4, rng)], [asked(rate, 4, rng)])
        assert found is not None
        effects.append(found.effect)
        errors.append(found.error)
    assert np.std(effects) == pytest.approx(np.mean(errors), rel=0.1)
    assert np.mean(effects) == pytest.approx(0.05, abs=4 * np.mean(errors) / 300**0.5)


def test_other_prompts_are_not_paired() -> None:
    rng = np.random.default_rng(0)
    one = asked(rates(rng), 4, rng)
    assert paired([one], [replace(one, prompts=PROMPTS[::-1])]) is None
    assert paired([one], [one.of_tag("counting")]) is None and paired([], [one]) is None


def ladder(name: str, lift: float, seeds: int, rng: np.random.Generator, answered: bool = True) -> Points:
    """Scores of 4 sizes x seeds; the seed moves both arms alike (the data's order), `lift` one of them."""
    n = np.repeat(np.geomspace(1e6, 1e9, 4), seeds)
    p = chinchilla_points(n, np.full(len(n), 1e9), 0.0, rng)
    rate, order = rates(np.random.default_rng(7)), np.tile(np.linspace(-0.03, 0.03, seeds), 4)
    runs = [asked(np.clip(rate + lift + shift, 0, 1), 4, rng) for shift in order]
    y = np.array([r.mean.mean() for r in runs])
    return replace(
        p, y=y, kind="score", metric="geneval", se=np.full(len(n), 0.03), group={"arm": name},
        seed=np.tile([str(s) for s in range(seeds)], 4), answers=dict(enumerate(runs)) if answered else {},
    )  # fmt: skip


def test_a_contrast_is_paired_over_prompts_and_seeds_and_says_so() -> None:
    rng, held = np.random.default_rng(0), []
    a = b = ladder("a", 0.08, 3, rng)
    for _ in range(30):
        a, b = ladder("a", 0.08, 3, rng), ladder("b", 0.0, 3, rng)
        found = contrast(a, b, None, None, "largest", 0.95)
        assert found is not None and found.paired_by == ("seeds", "prompts")
        assert found.error_unpaired is not None and found.error < found.error_unpaired
        assert found.error < found.detectable < 5 * found.error
        held.append(found.low < 0.08 < found.high)
    assert np.mean(held) >= 0.95 - 3 * 0.04
    plain = [replace(p, answers={}) for p in (a, b)]
    without = contrast(*plain, None, None, "largest", 0.95)
    assert without is not None and without.paired_by == ("seeds",) and without.error_unpaired is None
    assert without.error > contrast(a, b, None, None, "largest", 0.95).error  # type: ignore[union-attr]


def test_seeds_that_moved_both_arms_alike_cancel() -> None:
    rng = np.random.default_rng(0)
    n, seeds = np.repeat(np.geomspace(1e6, 1e9, 4), 4), np.tile(list("0123"), 4)
    order = np.tile([-0.02, -0.01, 0.01, 0.02], 4)
    p = chinchilla_points(n, np.full(16, 1e9), 0.0, rng)
    a, b = (
        replace(p, y=p.y * np.exp(lift + order + 0.001 * rng.normal(size=16)), seed=seeds, group={"arm": str(lift)})
        for lift in (0.01, 0.0)
    )
    found = contrast(a, b, None, None, "largest", 0.95)
    assert found is not None and found.paired_by == ("seeds",)
    assert found.effect == pytest.approx(0.01, abs=0.002) and found.sign == 1 and found.error < 0.002
    # arms of unlike seeds share no order: nothing cancels, and with no law the noise between runs is unknown
    other = contrast(a, replace(b, seed=np.full(16, "9")), None, None, "largest", 0.95)
    assert other is None


def test_crossings_of_each_seed_are_close_where_seeds_move_both_arms() -> None:
    rng = np.random.default_rng(0)
    n, seeds = np.tile(np.geomspace(1e6, 1e9, 8), 3), np.repeat(list("012"), 8)
    order = np.repeat([-0.05, 0.0, 0.05], 8)
    p = chinchilla_points(n, np.full(24, 1e9), 0.0, rng)
    laws = []
    for amplitude, exponent in ((400.0, 0.38), (20.0, 0.18)):
        y = (1.0 + amplitude * n**-exponent) * np.exp(order + 0.0005 * rng.normal(size=24))
        laws.append(fit(law("power-floor"), replace(p, y=y, seed=seeds), thorough=False))
    meet = 20.0 ** (1 / 0.2)
    found = crossings_by_seed(*laws, np.geomspace(1e5, 1e10, 400), 0.95)
    assert len(found["by_seed"]) == 3 and found["paired_interval"][0] < meet < found["paired_interval"][1]
    assert found["paired_interval"][1] / found["paired_interval"][0] < 1.6
    one = fit(law("power-floor"), laws[0].points.take(seeds == "0"), thorough=False)
    assert crossings_by_seed(one, laws[1], np.geomspace(1e5, 1e10, 50), 0.95)["paired_interval"] is None


def test_the_file_beside_a_table_reaches_the_points(tmp_path: Path) -> None:
    rows = [("r1", "geneval", t, p, 0.5, 4) for t, p in zip(TAGS, PROMPTS, strict=True)]
    frame = pd.DataFrame(rows, columns=["run_id", "metric", "tag", "prompt", "mean", "n"]).sample(
        frac=1, random_state=0
    )
    frame.to_parquet(tmp_path / FILE)
    found = beside(tmp_path / "runs.csv")
    assert list(found["r1", "geneval"].prompts) == list(PROMPTS)
    part = of_metric(found, "r1", "geneval_counting")
    assert part is not None and len(part.mean) == 60 and of_metric(found, "r2", "geneval") is None
    table = pd.DataFrame({"run_id": ["r1", "r2"], "params_total": [1e6, 2e6], "images": 5, "geneval": [0.5, 0.6]})
    prepared = replace(prepare(table.assign(geneval_se=0.01), "", "frame"), answers=found)
    points, _ = select(prepared, {}, prepared.frame, "geneval")
    assert list(points.answers) == [0]
    assert beside(tmp_path / "elsewhere" / "runs.csv") == {}


def test_an_unreadable_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not parquet")
    with pytest.raises(InvalidTable, match="UNREADABLE_PROMPTS"):
        beside(tmp_path / "runs.csv")
    pd.DataFrame({"run_id": ["a"]}).to_parquet(tmp_path / FILE)
    with pytest.raises(InvalidTable, match="UNREADABLE_PROMPTS"):
        beside(tmp_path / "runs.csv")
