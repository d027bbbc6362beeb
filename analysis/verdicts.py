"""The published claims (Fluid, arXiv 2410.13863), each judged by what the table can say of it.

`holds` and `reversed` need an interval that excludes zero (the tenth claim, which says that two values do not differ,
holds where it does not); a comparison of one run each against noise that was never measured stays `undecided`; a claim
whose rows are missing is `not measured`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from analysis.compare import POWER, Contrast, contrast, detectable, noises
from analysis.distributions import normal_quantile, slope, two_sided
from analysis.fit import Fit
from analysis.links import join, pearson
from analysis.noise import SeedNoise
from analysis.points import Points

HOLDS, REVERSED, UNDECIDED, NOT_MEASURED = "holds", "reversed", "undecided", "not measured"
# the published r of loss to FID and to GenEval is .92 to .93 in magnitude; "close to linear" is read as at least this
NEARLY_LINEAR = 0.9


@dataclass(frozen=True)
class Evidence:
    """What the claims are judged on: points and N-laws by (metric, token kind, order)."""

    points: dict[tuple[str, str, str], Points]
    laws: dict[tuple[str, str, str], Fit]
    level: float

    def arms(self, metric: str) -> list[tuple[str, str]]:
        return [(kind, order) for m, kind, order in self.points if m == metric]

    def contrast(self, metric: str, a: tuple[str, str], b: tuple[str, str], at: str) -> Contrast | None:
        """Arm a minus arm b; None where either is missing or their units differ."""
        left, right = (metric, *a), (metric, *b)
        if left not in self.points or right not in self.points:
            return None
        a_points, b_points = self.points[left], self.points[right]
        fit_a, fit_b = self.laws.get(left), self.laws.get(right)
        seeds = self.seeds[metric, a_points.name], self.seeds[metric, b_points.name]
        return contrast(a_points, b_points, fit_a, fit_b, at, self.level, metric == "val_loss", seeds)

    @cached_property
    def seeds(self) -> dict[tuple[str, str], SeedNoise | None]:
        """What a seed does to each metric of each arm."""
        return noises(list(self.points.values()))

    @property
    def distance(self) -> str:
        return "fid" if any(m == "fid" for m, *_ in self.points) else "fd"


CR, CA, DR, DA = ("continuous", "random"), ("continuous", "raster"), ("discrete", "random"), ("discrete", "raster")
Estimate = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Judgement:
    """A verdict with its weakest effect, its evidence and the rows it rests on.

    `detectable` is the least effect that these runs would have shown four times out of five.
    """

    verdict: str
    effect: float | None = None
    interval: tuple[float, float] | None = None
    text: str = ""
    rows: Sequence[int] = ()
    detectable: float | None = None


_NOTHING = Judgement(NOT_MEASURED)


def _agree(signs: Sequence[int]) -> str:
    """holds when every part is significant in the claimed direction (+1), reversed when none is and one is against."""
    if not signs:
        return NOT_MEASURED
    if all(s > 0 for s in signs):
        return HOLDS
    return REVERSED if min(signs) < 0 and max(signs) <= 0 else UNDECIDED


def _name(arm: tuple[str, str]) -> str:
    return "-".join(arm)


def _say(c: Contrast) -> str:
    return f"{c.a} − {c.b} in {c.metric} at {c.at}: {c.effect:+.4f} [{c.low:+.4f}, {c.high:+.4f}]"


def _judge(found: Sequence[tuple[Contrast | None, int]]) -> Judgement:
    """Contrasts with the sign the claim gives them."""
    known = [(c, sign) for c, sign in found if c is not None]
    if not known or len(known) < len(found):
        return _NOTHING
    weakest = min(known, key=lambda pair: pair[1] * pair[0].effect / (pair[0].high - pair[0].low))[0]
    rows = sorted({r for c, _ in known for r in c.rows})
    signs = [sign * c.sign for c, sign in known]
    mixed = "its parts point both ways: " if min(signs) < 0 < max(signs) else ""
    text = mixed + "; ".join(_say(c) for c, _ in known)
    least = max((c.detectable for (c, _), s in zip(known, signs, strict=True) if s <= 0), default=None)
    return Judgement(_agree(signs), weakest.effect, (weakest.low, weakest.high), text, rows, least)


def _from_half(estimate: Estimate, dof: float, level: float) -> float:
    """The detectable effect behind an estimate's interval."""
    return detectable((estimate[2] - estimate[1]) / 2 / two_sided(level, dof), dof, level)


def _slope(x: np.ndarray, y: np.ndarray, level: float) -> Estimate | None:
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    return slope(x, y, level)


def bend_of(p: Points, tests: int, level: float) -> Estimate | None:
    """The bend of log metric on log N, looked for in `tests` ladders at once: Bonferroni's level for each."""
    return _curvature(np.log(p.n), np.log(np.maximum(p.y, 1e-6)), 1 - (1 - level) / tests)


def _excludes_zero(estimate: Estimate | None) -> bool:
    return estimate is not None and (estimate[1] > 0 or estimate[2] < 0)


def _in_words(bend: Estimate | None) -> str:
    return "bend unknown" if bend is None else f"bend {bend[0]:+.4f} [{bend[1]:+.4f}, {bend[2]:+.4f}]"


def weaker(a: Estimate | None, b: Estimate) -> Estimate:
    """The estimate that is fewer half-widths from zero: effects of unlike units are compared in those."""
    if a is None:
        return b
    return min(a, b, key=lambda e: abs(e[0]) / max((e[2] - e[1]) / 2, 1e-300))


def _loss_falls(e: Evidence) -> Judgement:
    """Claim 1: the slope of log loss on log N is negative in every arm, every step goes down, and no arm is bent.

    As the paper draws it a power law is straight in the logs, which a loss with a floor is not; claim 2 reads it alike.
    """
    arms = e.arms("val_loss")
    if len(arms) < 4:
        return _NOTHING
    signs, says, rows, slopes, seen, against = [], [], [], [], [], []
    for arm in arms:
        p = e.points[("val_loss", *arm)].largest_data()
        found = _slope(np.log(p.n), np.log(p.y), e.level)
        if found is None:
            return _NOTHING
        means = [np.mean(p.y[p.n == n]) for n in np.unique(p.n)]
        steady, bend = all(b < a for a, b in pairwise(means)), bend_of(p, len(arms), e.level)
        signs.append(1 if found[2] < 0 and steady else -1 if found[1] > 0 else 0)
        course = "monotone" if steady else "not monotone"
        says.append(f"{_name(arm)}: slope {found[0]:.4f} [{found[1]:.4f}, {found[2]:.4f}], {course}, {_in_words(bend)}")
        against += [f"{_name(arm)} is bent in the logs"] if _excludes_zero(bend) else []
        law = e.laws.get(("val_loss", *arm))
        missed = law is not None and any(w.code == "LACK_OF_FIT" for w in law.warnings)
        against += [f"{_name(arm)} has LACK_OF_FIT under a law with a floor"] if missed else []
        slopes.append(found)
        seen.append(_from_half(found, len(p) - 2, e.level))
        rows += p.rows.tolist()
    verdict = _agree(signs)
    if verdict == HOLDS and against:
        verdict = UNDECIDED
        says.append(f"the loss falls, but a power law, straight in the logs, is refuted: {', '.join(against)}")
    worst = max(slopes)
    return Judgement(verdict, worst[0], worst[1:], "; ".join(says), rows, max(seen))


def _improves_not_strictly(e: Evidence) -> Judgement:
    """Claim 2: the metrics move with the loss in every arm, and log metric on log N is curved somewhere."""
    signs, says, rows, bends, weakest, seen = [], [], [], [], None, []
    pairs = [(m, better, arm) for m, better in ((e.distance, 1), ("geneval", -1)) for arm in e.arms(m)]
    pairs = [(m, better, arm) for m, better, arm in pairs if ("val_loss", *arm) in e.points]
    for metric, better, arm in pairs:
        p = e.points[(metric, *arm)].largest_data()
        both = join(e.points[("val_loss", *arm)].largest_data(), p)
        found = _slope(both.loss, both.value, e.level)
        if found is None:
            continue
        signs.append(better * (1 if found[1] > 0 else -1 if found[2] < 0 else 0))
        bend = bend_of(p, len(pairs), e.level)
        bends.append(_excludes_zero(bend))
        if bend is not None:
            seen.append(_from_half(bend, len(p) - 3, 1 - (1 - e.level) / len(pairs)))
        says.append(
            f"{metric} {_name(arm)}: {found[0]:+.4g} per unit of loss [{found[1]:.4g}, {found[2]:.4g}], "
            f"{_in_words(bend)}"
        )
        weakest = weaker(weakest, found)
        rows += p.rows.tolist()
    if weakest is None:
        return _NOTHING
    verdict = _agree(signs)
    each = 1 - (1 - e.level) / len(pairs)
    says.append(f"{sum(bends)} of {len(bends)} bends of log metric on log N exclude zero, each at {100 * each:.4g} %")
    if verdict == HOLDS and not any(bends):
        verdict = UNDECIDED
        says.append("no departure from a power law in N could be shown: the effect to be seen is of log metric's bend")
    return Judgement(verdict, weakest[0], weakest[1:], "; ".join(says), rows, min(seen, default=None))


def _curvature(x: np.ndarray, y: np.ndarray, level: float) -> Estimate | None:
    """The quadratic coefficient of y on x with its t interval; None without a degree of freedom left."""
    if len(x) < 4 or len(np.unique(x)) < 3:
        return None
    design = np.stack([np.ones_like(x), x - x.mean(), (x - x.mean()) ** 2], axis=1)
    theta, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ theta
    variance = float(rest @ rest) / (len(x) - 3) * np.linalg.inv(design.T @ design)[2, 2]
    half = two_sided(level, len(x) - 3) * float(np.sqrt(variance))
    return float(theta[2]), float(theta[2]) - half, float(theta[2]) + half


def _best_arm(e: Evidence) -> Judgement:
    """Claim 3: continuous random is best on both metrics at the largest size."""
    found = [(e.contrast(e.distance, CR, other, "largest"), -1) for other in (CA, DR, DA)]
    return _judge([*found, *((e.contrast("geneval", CR, other, "largest"), 1) for other in (CA, DR, DA))])


def _continuous_wins(e: Evidence) -> Judgement:
    return _judge([(e.contrast(e.distance, CR, DR, "largest"), -1), (e.contrast(e.distance, CA, DA, "largest"), -1)])


def _random_wins_score(e: Evidence) -> Judgement:
    """Claim 5: random above raster on the score for both token kinds; evidence also names the tag with most objects."""
    judged = _judge([(e.contrast("geneval", a, b, "largest"), 1) for a, b in ((CR, CA), (DR, DA))])
    tags = [e.contrast(f"geneval_{tag}", CR, CA, "largest") for tag in ("two_object", "single_object")]
    if judged.verdict == NOT_MEASURED or None in tags:
        return judged
    return replace(judged, text="; ".join((judged.text, *(_say(c) for c in tags if c is not None))))


def _small_continuous_not_better(e: Evidence) -> Judgement:
    return _judge([(e.contrast(e.distance, CR, DR, "smallest"), 1), (e.contrast(e.distance, CA, DA, "smallest"), 1)])


def _higher_loss_better_images(e: Evidence) -> Judgement:
    """Claim 7. As in the paper, each order's loss is its own objective's, within one unit."""
    pairs = ((CR, CA), (DR, DA))
    losses = [(e.contrast("val_loss", a, b, "all"), 1) for a, b in pairs]
    return _judge([*losses, *((e.contrast(e.distance, a, b, "largest"), -1) for a, b in pairs)])


def _steps_help(e: Evidence) -> Judgement:
    """Claim 8: in continuous random, every measured metric improves with more data at each size (paired, t)."""
    signs, says, rows, effect, seen = [], [], [], None, []
    for metric, better in (("val_loss", -1), (e.distance, -1), ("geneval", 1)):
        p = e.points.get((metric, *CR))
        if p is None:
            return _NOTHING
        changes = []
        for n in np.unique(p.n):
            here = p.take(p.n == n)
            if len(np.unique(here.d)) > 1:
                first, last = here.y[here.d == here.d.min()].mean(), here.y[here.d == here.d.max()].mean()
                changes.append(last - first if metric == "geneval" else np.log(last / first))
                rows += here.rows.tolist()
        if len(changes) < 3 or len(set(p.protocols)) > 1:
            return Judgement(NOT_MEASURED, text=f"{metric} was not measured alike at several data sizes")
        half = two_sided(e.level, len(changes) - 1) * np.std(changes, ddof=1) / np.sqrt(len(changes))
        mean = float(np.mean(changes))
        signs.append(better * (1 if mean - half > 0 else -1 if mean + half < 0 else 0))
        says.append(f"{metric}: {mean:+.4f} ± {half:.4f} from the smallest to the largest data size")
        found = (mean, mean - half, mean + half)
        effect = weaker(effect, found)
        seen.append(_from_half(found, len(changes) - 1, e.level))
    assert effect is not None
    return Judgement(_agree(signs), effect[0], effect[1:], "; ".join(says), rows, max(seen))


def _nearly_linear(e: Evidence) -> Judgement:
    """Claim 9: |r| of loss to both metrics in continuous random is at least NEARLY_LINEAR."""
    signs, says, rows, weakest, sizes = [], [], [], None, []
    for metric in (e.distance, "geneval"):
        if (metric, *CR) not in e.points or ("val_loss", *CR) not in e.points:
            return _NOTHING
        p = e.points[(metric, *CR)].largest_data()
        both = join(e.points[("val_loss", *CR)].largest_data(), p)
        found = pearson(both.loss, both.value, e.level)
        if found is None:
            return _NOTHING
        low, high = sorted((abs(found[1]), abs(found[2])))
        same_sign = found[1] * found[2] > 0
        signs.append(1 if same_sign and low >= NEARLY_LINEAR else -1 if high < NEARLY_LINEAR else 0)
        says.append(f"{metric}: r = {found[0]:.4f} [{found[1]:.4f}, {found[2]:.4f}]")
        weakest = found if weakest is None or abs(found[0]) < abs(weakest[0]) else weakest
        sizes.append(len(both.loss))
        rows += p.rows.tolist()
    assert weakest is not None
    # Fisher's z of the least |r| whose interval would lie above NEARLY_LINEAR four times out of five
    reach = (normal_quantile(0.5 + e.level / 2) + normal_quantile(POWER)) / np.sqrt(min(sizes) - 3)
    least = float(np.tanh(np.arctanh(NEARLY_LINEAR) + reach))
    return Judgement(_agree(signs), weakest[0], weakest[1:], "; ".join(says), rows, least)


def _peak_within_error(e: Evidence) -> Judgement:
    """Claim 10 speaks of sizes 3.1B and 10.5B alone: their difference lies within its own error."""
    p = e.points.get(("geneval", *CR))
    if p is None or p.n.max() < 1e10 or not np.isclose(p.n, 3.1e9, rtol=0.05).any():
        return _NOTHING
    last, before = (p.take(np.isclose(p.n, n, rtol=0.05)) for n in (p.n.max(), 3.1e9))
    gap = float(last.y.mean() - before.y.mean())
    half = normal_quantile(0.5 + e.level / 2) * float(np.hypot(last.se.mean(), before.se.mean()))
    if not np.isfinite(half):
        return Judgement(UNDECIDED, gap, text="no standard errors", rows=(*last.rows, *before.rows))
    verdict = HOLDS if abs(gap) < half else REVERSED
    text, least = f"10.5B − 3.1B: {gap:+.4f} ± {half:.4f}", _from_half((gap, gap - half, gap + half), np.inf, e.level)
    return Judgement(verdict, gap, (gap - half, gap + half), text, (*last.rows, *before.rows), least)


def _order_by_kind(e: Evidence) -> Judgement:
    return _judge([(e.contrast(e.distance, CR, CA, "largest"), -1), (e.contrast(e.distance, DA, DR, "largest"), -1)])


CLAIMS: tuple[tuple[int, str, Callable[[Evidence], Judgement]], ...] = (
    (1, "Validation loss falls as a power law in N for all four arms", _loss_falls),
    (2, "FD and GenEval improve with lower loss but do not follow the power law strictly", _improves_not_strictly),
    (3, "Random order with continuous tokens is best on both metrics at the largest size", _best_arm),
    (4, "Continuous tokens beat discrete ones on image quality in either order", _continuous_wins),
    (5, "Random order beats raster on GenEval, most with several objects", _random_wins_score),
    (6, "At the smallest size continuous tokens are not better than discrete ones", _small_continuous_not_better),
    (7, "Random order has a higher validation loss than raster and better images", _higher_loss_better_images),
    (8, "For random with continuous tokens loss, FD and GenEval improve with steps", _steps_help),
    (9, "Loss to metric is close to linear for random with continuous tokens", _nearly_linear),
    (10, "GenEval at 10.5B differs from 3.1B by less than its own sampling error", _peak_within_error),
    (11, "Continuous tokens prefer random order, discrete ones raster", _order_by_kind),
)


def verdicts(points: Sequence[Points], fits: Sequence[Fit], level: float) -> list[dict[str, Any]]:
    """Every claim with its verdict, effect, interval and rows; [] for a table that measures none of them.

    Groups of mixed settings, or that a further column tells apart, are not the claims' arms: nothing is measured.
    """
    arm = {"token_kind", "order"}
    if not any(arm <= set(p.group) for p in points):
        return []
    own = [p for p in points if arm == set(p.group) and not p.mixed]
    named = {(p.metric, p.group["token_kind"], p.group["order"]): p for p in own}
    laws = {
        (f.points.metric, f.points.group["token_kind"], f.points.group["order"]): f
        for f in fits
        if f.law.axes == ("n",) and f.law.name in ("power-floor", "logit") and arm == set(f.points.group)
    }
    evidence = Evidence(named, laws, level)
    out = []
    for number, claim, judge in CLAIMS:
        found = judge(evidence)
        out.append({
            "number": number, "claim": claim, "verdict": found.verdict, "effect": found.effect,
            "interval": list(found.interval) if found.interval is not None else None,
            "detectable": found.detectable,
            "evidence": {"text": found.text or "no rows speak to it", "rows": sorted({int(r) for r in found.rows})},
        })  # fmt: skip
    return out if any(v["verdict"] != "not measured" for v in out) else []
