"""Numbers as people read them, and the report's summary in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from analysis.beside import is_flat
from analysis.document import HEADLINE_HALF_WIDTH
from analysis.figures import groups_of, measured, telling
from analysis.names import label_of, name_of, title_of
from analysis.refusals import gathered
from analysis.study import FORCED_FLOOR
from analysis.table import is_part

Document = dict[str, Any]
VERDICTS = ("holds", "reversed", "undecided", "not measured")


def digits(value: float | None, figures: int = 4) -> str:
    """At least four significant digits, trailing zeros kept; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.{figures - 1}e}"
    if abs(value) >= 10**figures:
        return f"{value:.0f}"
    return f"{value:#.{figures}g}".rstrip(".")


def span(pair: Sequence[float | None] | None) -> str:
    return "–" if not pair or pair[0] is None else f"[{digits(pair[0])}, {digits(pair[1])}]"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def rounded(value: float, half: float, sign: bool = False) -> str:
    """A headline number with no more decimals than its half-width carries: 0.34 ± 0.08, 0.341 ± 0.006."""
    decimals = max(0, -math.floor(math.log10(half))) if half > 0 else 4
    decimals += half * 10**decimals < 2  # a half-width that begins with 1 keeps a second digit
    return f"{value:{'+' if sign else ''}.{decimals}f} ± {half:.{decimals}f}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _has_forced_floor(fit: Document) -> bool:
    return any(w["code"] == FORCED_FLOOR for w in fit["warnings"])


def _headlines(doc: Document, metric: str) -> list[str]:
    """The exponents that the data carry, one law a group: the one fitted to most runs."""
    out, silent = [], []
    for m in measured(doc, metric):
        known = any(None not in m[axis] for axis in ("n", "d"))
        fits = [f for f in doc["fits"] if f["metric"] == metric and f["group"] == m["group"]]
        fits = [f for f in fits if not (known and f["axes"] == ["c"])]
        # first the law, of the joint ones the better by AICc, then what it carries: not the law that claims most;
        # a law without a floor is better by AICc wherever the floor is small beside the noise
        joint = [f for f in fits if len(f["axes"]) > 1 and f["aicc"] is not None and not _has_forced_floor(f)]
        chosen = [min(joint, key=lambda f: f["aicc"])] if joint else []
        carried = [f for f in (*chosen, *(f for f in fits if len(f["axes"]) == 1)) if f["headline"]]
        if not carried:
            silent.append(label_of(m["group"]))
            continue
        best = carried[0]
        values = (f"{k} {rounded(best['params'][k], best['half_widths'][k])}" for k in best["headline"])
        axes = [axis.upper() for axis in best["axes"]]
        of = f"along {axes[0]}" if len(axes) == 1 else f"joint in {' and '.join(axes)}"
        out.append(f"{label_of(m['group'])} {', '.join(values)} ({best['law']}, {of})")
    lines = [f"Exponents of {title_of(metric)} that the data carry: {'; '.join(out)}."] if out else []
    if silent and doc["fits"]:
        lines.append(
            f"The data carry no exponent of a law of {title_of(metric)} for {', '.join(silent)}: half-widths exceed "
            f"{HEADLINE_HALF_WIDTH} or a guard forbids it; the table of laws has the numbers."
        )
    return [*_slopes(doc, metric), *lines]


def _slopes(doc: Document, metric: str) -> list[str]:
    """The mean slope of log metric on log N over the ladder: a description of what was measured, not a law."""
    out = []
    for d in doc["doublings"]:
        if d["metric"] == metric:
            middle, low, high = (math.log2(1 + v) for v in d["change"])
            if (high - low) / 2 <= HEADLINE_HALF_WIDTH:
                out.append(f"{label_of(d['group'])} {rounded(middle, (high - low) / 2, sign=True)}")
    return [f"Mean slope of log {title_of(metric)} on log N over the ladder: {'; '.join(out)}."] if out else []


def _best(doc: Document, metric: str) -> str | None:
    found = [
        (y, n, label_of(m["group"]), m["kind"])
        for m in measured(doc, metric)
        for y, n, top in zip(m["y"], m["n"], m["largest"], strict=True)
        if top
    ]
    if len({arm for _, _, arm, _ in found}) < 2:
        return None
    y, n, arm, _ = max(found) if found[0][3] == "score" else min(found)
    return f"Best {title_of(metric)}: {digits(y)} by {arm}" + (f" at {n:,.0f} parameters." if n else ".")


def _pairs(doc: Document, metric: str) -> tuple[list[Document], str]:
    """The comparisons of what lies side by side, and of what they are: pairs of one arm's settings that differ in one
    thing; of arms, where no settings vary."""
    groups, arm = groups_of(doc), ("token_kind", "order")
    every = [c for c in telling(doc, doc["contrasts"]) if c["metric"] == metric]
    settings = [c for c in every if all(groups[c["a"]].get(k) == groups[c["b"]].get(k) for k in arm)]
    return (settings, "an arm's settings") if settings else (every, "arms")


def _told_apart(doc: Document, metric: str) -> str | None:
    """How many pairs differ in the metric, and which one most surely does."""
    groups, (pairs, what) = groups_of(doc), _pairs(doc, metric)
    told = [c for c in pairs if c["sign"]]
    if not pairs:
        return None
    line = f"{capital(title_of(metric))}: {len(told)} of {len(pairs)} pairs of {what} are told apart"
    if not told:
        return line + "."
    most = max(told, key=lambda c: abs(c["effect"]) / (c["high"] - c["low"]))
    side = "above" if most["sign"] > 0 else "below"
    effect = f"{digits(most['effect'])} {span((most['low'], most['high']))}"
    return f"{line}, most surely {label_of(groups[most['a']])} {side} {label_of(groups[most['b']])}: {effect}."


def _tuned(doc: Document) -> list[str]:
    """How the best value of what was varied at every size moves with size."""
    out, known = [], [o for o in doc.get("optima", []) if not is_part(o["metric"])]
    for metric, setting, along in dict.fromkeys((o["metric"], o["setting"], o["along"]) for o in known):
        found = [o for o in known if (o["metric"], o["setting"], o["along"]) == (metric, setting, along)]
        moving = [(label_of(o["group"]), *o["moves"]) for o in found if o["moves"]]
        moves = [f"{label} {digits(power, 3)} {span(ends)}" for label, power, *ends in moving]
        beyond = [label_of(o["group"]) for o in found if any(s["at_end"] for s in o["sizes"])]
        what = f"The best {setting} for {title_of(metric)}"
        out += [f"{what} moves with {along} by the power {'; '.join(moves)}."] if moves else []
        out += (
            [f"{what} is, at some size, the first or the last that was tried: {', '.join(beyond)}."] if beyond else []
        )
    return out


def _by_chance(doc: Document, metrics: Sequence[str]) -> str | None:
    """What so many comparisons would show where there is nothing."""
    made, share = sum(len(_pairs(doc, m)[0]) for m in metrics), round(1 / (1 - doc["level"]))
    said = f"{made} comparisons were made: about 1 in {share} of those without a difference is told apart by chance."
    return said if made > 1 else None


def summary(doc: Document) -> list[str]:
    """The report's first lines: what moved, what is best, which exponents the data carry, what the claims came to."""
    metrics, flat = dict.fromkeys(m["metric"] for m in doc["measurements"]), is_flat(doc)
    out: list[str | None] = []
    for metric in (m for m in metrics if not is_part(m) and m != "val_nll"):
        if any(m["kind"] != "loss" for m in measured(doc, metric)):
            out.append(_best(doc, metric))
        elif not flat:
            out += _headlines(doc, metric)
    if flat:
        whole = [metric for metric in metrics if not is_part(metric)]
        out += [*(_told_apart(doc, metric) for metric in whole), _by_chance(doc, whole)]
    out += _tuned(doc)
    if doc["verdicts"]:
        counts = {state: sum(v["verdict"] == state for v in doc["verdicts"]) for state in VERDICTS}
        out.append(
            f"Of {len(doc['verdicts'])} published claims: " + ", ".join(f"{n} {s}" for s, n in counts.items()) + "."
        )
    noise = [n["standard_deviation"] for n in doc["noise"] if n["metric"] == doc["headline_metric"]]
    if noise and not any(noise):
        rest = "rest on the scatter around the laws" if doc["fits"] else "hold the evaluation's error"
        out.append(f"No run was repeated with another seed: intervals {rest} alone.")
    if doc["refused"] and not doc["fits"]:
        code, reason, _ = gathered(doc)[0]
        out.append(f"No law was fitted, {code}: {reason}.")
    names = {name_of(m["group"]) for m in doc["measurements"]}
    if any(s["largest"] for s in doc["measurements"]) and doc["table"]["excluded"]:
        out.append(
            f"{len(doc['table']['excluded'])} cells or rows were left out of {len(names)} groups; each is named below."
        )
    return [line for line in out if line]
