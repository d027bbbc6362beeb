"""Held-out combinations against seen ones: the tags that both have, errors over prompts, the trend in log odds."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.answers import Answers
from analysis.composition import composition
from analysis.points import Points
from analysis.simulate import chinchilla_points

IMAGES = 4


def answers(tags: dict[str, float], prompts: int, rng: np.random.Generator) -> Answers:
    """`prompts` a tag, each right at the tag's rate."""
    names = np.repeat(list(tags), prompts)
    rate = np.repeat(list(tags.values()), prompts)
    texts = np.array([f"{tag} {k}" for k, tag in enumerate(names)])
    return Answers(names, texts, rng.binomial(IMAGES, rate) / IMAGES, np.full(len(names), float(IMAGES)))


def scores(metric: str, asked: list[Answers]) -> Points:
    n = np.geomspace(1e5, 1e6, len(asked))
    p = chinchilla_points(n, np.full(len(n), 1e9), 0.0, np.random.default_rng(0))
    y = np.array([a.mean.mean() for a in asked])
    return replace(p, metric=metric, kind="score", y=y, answers=dict(zip(p.rows.tolist(), asked, strict=True)))


def ladder(gap: float, prompts: int, seed: int = 0, sizes: int = 4) -> list[Points]:
    """Log odds of the seen part rise along the ladder; those of the held-out part lie `gap` below throughout."""
    rng = np.random.default_rng(seed)

    def rate(odds: float) -> float:
        return 1 / (1 + np.exp(-odds))

    odds = np.linspace(-1, 2, sizes)
    seen = [answers({"colors": rate(o), "position": rate(o - 0.4), "counting": 0.99}, prompts, rng) for o in odds]
    held = [answers({"colors": rate(o - gap), "position": rate(o - 0.4 - gap)}, prompts, rng) for o in odds]
    return [scores("geneval", seen), scores("geneval_unseen", held)]


def test_only_tags_that_both_have_are_compared() -> None:
    (found,) = composition(ladder(0.0, 4000), 0.95)
    assert len(found["sizes"]) == 4
    for size in found["sizes"]:
        # counting, right nearly always, has no held-out part: with it in, the gap would be large
        assert abs(size["gap"][0]) < 0.02 and size["gap"][0] == pytest.approx(size["seen"] - size["unseen"])


def test_the_trend_is_flat_where_the_gap_in_log_odds_is_constant() -> None:
    (found,) = composition(ladder(1.0, 4000), 0.95)
    gaps = [s["gap"][0] for s in found["sizes"]]
    assert gaps[-1] < 0.8 * max(gaps)  # the plain difference closes by itself near the top
    assert [s["log_odds_gap"][0] for s in found["sizes"]] == pytest.approx([1.0] * 4, abs=0.08)
    assert found["trend"][0] == pytest.approx(0.0, abs=0.03) and found["trend"][1] < 0 < found["trend"][2]


def test_the_intervals_cover() -> None:
    (exact,) = composition(ladder(1.0, 200_000), 0.9)
    hits = []
    for seed in range(100):
        (found,) = composition(ladder(1.0, 30, seed), 0.9)
        for name in ("gap", "log_odds_gap"):
            truth = exact["sizes"][1][name][0]
            _, low, high = found["sizes"][1][name]
            hits.append(low <= truth <= high)
    assert 0.84 <= np.mean(hits) <= 0.96


def test_a_score_of_zero_and_missing_answers() -> None:
    rng = np.random.default_rng(0)
    nothing, all_right = answers({"colors": 0.0}, 20, rng), answers({"colors": 1.0}, 20, rng)
    pair = [scores("geneval", [all_right, all_right]), scores("geneval_unseen", [nothing, nothing])]
    (found,) = composition(pair, 0.95)
    assert found["trend"] is None and all(np.isfinite(s["log_odds_gap"]).all() for s in found["sizes"])
    assert composition([pair[0], replace(pair[1], answers={})], 0.95) == []
    assert composition(pair[:1], 0.95) == []
