"""Compositional generalisation: combinations held out of training against seen ones, on the tags that both have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.answers import Answers
from analysis.distributions import normal_quantile, slope
from analysis.laws import Array
from analysis.points import Points

SEEN, UNSEEN = "geneval", "geneval_unseen"
# a score of 0 or 1 has no log odds: half an image away from it, as in Haldane 1956 (Ann. Hum. Genet. 20)
HALF_AN_IMAGE = 0.5


def _over(answers: Answers, tags: np.ndarray) -> tuple[float, float]:
    """The mean of the tags' means and its variance over prompts."""
    parts = [answers.mean[answers.tags == tag] for tag in tags]
    variance = sum(float(p.var(ddof=1)) / len(p) if len(p) > 1 else float("nan") for p in parts)
    return float(np.mean([p.mean() for p in parts])), variance / len(parts) ** 2


def _log_odds(score: float, images: float) -> tuple[float, float]:
    """Log odds and their derivative by the score, which is kept half an image off 0 and 1."""
    least = HALF_AN_IMAGE / images
    inside = min(max(score, least), 1 - least)
    return float(np.log(inside / (1 - inside))), 1 / (inside * (1 - inside))


def _run(seen: Answers, unseen: Answers) -> dict[str, float] | None:
    tags = np.intersect1d(seen.tags, unseen.tags)
    if not len(tags):
        return None
    (s, s_var), (u, u_var) = _over(seen, tags), _over(unseen, tags)
    (s_odds, s_slope), (u_odds, u_slope) = (_log_odds(v, a.n.sum()) for v, a in ((s, seen), (u, unseen)))
    return {
        "seen": s, "unseen": u, "gap": s - u, "error": float(np.sqrt(s_var + u_var)), "tags": len(tags),
        "log_odds_gap": s_odds - u_odds, "log_odds_error": float(np.sqrt(s_var * s_slope**2 + u_var * u_slope**2)),
    }  # fmt: skip


def _size(n: float, runs: Sequence[dict[str, float]], z: float) -> dict[str, Any]:
    """The mean over the runs of one size; they share their prompts, so the error over prompts is not divided."""
    out: dict[str, Any] = {"n": n, "runs": len(runs)}
    for name in ("seen", "unseen"):
        out[name] = float(np.mean([r[name] for r in runs]))
    for name, error in (("gap", "error"), ("log_odds_gap", "log_odds_error")):
        middle, half = (float(np.mean([r[key] for r in runs])) for key in (name, error))
        out[name] = [middle, middle - z * half, middle + z * half]
    return out


def _trend(sizes: Sequence[dict[str, Any]], level: float) -> list[float] | None:
    """The gap in log odds per doubling of N with its interval, from the sizes' scatter; None under three sizes."""
    if len(sizes) < 3:
        return None
    n: Array = np.array([s["n"] for s in sizes])
    return list(slope(np.log2(n), np.array([s["log_odds_gap"][0] for s in sizes]), level))


def composition(points: Sequence[Points], level: float) -> list[dict[str, Any]]:
    """A row a group: seen and unseen score of every size at its largest data size, their gap, how it moves with N.

    Where both are bounded, a difference shrinks at either end by itself: the trend is that of the log odds.
    """
    z, held = normal_quantile(0.5 + level / 2), {p.name: p for p in points if p.metric == UNSEEN}
    out = []
    for seen in (p.largest_data() for p in points if p.metric == SEEN and p.name in held):
        unseen, by_size = held[seen.name], {}
        for row, n in zip(seen.rows.tolist(), seen.n.tolist(), strict=True):
            if row in seen.answers and row in unseen.answers:
                found = _run(seen.answers[row], unseen.answers[row])
                if found:
                    by_size.setdefault(n, []).append(found)
        sizes = [_size(n, by_size[n], z) for n in sorted(by_size)]
        if sizes:
            out.append({"group": dict(seen.group), "sizes": sizes, "trend": _trend(sizes, level)})
    return out
