"""Numbers as people read them, and the report's summary in plain sentences."""

from __future__ import annotations

import math
from typing import Any

from analysis.document import HEADLINE_HALF_WIDTH
from analysis.figures import measured, title_of
from analysis.panels import label_of, name_of

Document = dict[str, Any]


def digits(value: float | None, figures: int = 4) -> str:
    """At least four significant digits, trailing zeros kept; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.{figures - 1}e}"
    text = f"{value:#.{figures}g}"
    return text.rstrip(".")


def span(pair: list[float] | tuple[float, float] | None) -> str:
    return "–" if not pair or pair[0] is None else f"[{digits(pair[0])}, {digits(pair[1])}]"


def rounded(value: float, half: float) -> str:
    """A headline number with no more decimals than its half-width carries: .34 ± .08, .341 ± .006."""
    decimals = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 4
    decimals = decimals - 1 if half / 10 ** -(decimals - 1) >= 3 else decimals
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


def _loss_sentence(doc: Document, metric: str) -> list[str]:
    out = []
    carried = [f for f in doc["fits"] if f["metric"] == metric and f["headline"] and f["axes"] != ["c"]]
    for f in carried:
        parts = [f"{k} = {rounded(f['params'][k], f['half_widths'][k])}" for k in f["half_widths"]]
        out.append(f"{label_of(f['group'])}: {title_of(metric)} follows the {f['law']} law with {', '.join(parts)}.")
    names = {name_of(f["group"]) for f in carried}
    rest = [label_of(m["group"]) for m in measured(doc, metric) if name_of(m["group"]) not in names]
    if rest:
        out.append(
            f"No exponent of {title_of(metric)} is given for {', '.join(rest)}: its 95 % half-width exceeds "
            f"{HEADLINE_HALF_WIDTH} or a guard forbids it (details below)."
        )
    return out


def _fall_sentence(doc: Document, metric: str) -> str | None:
    """Measured change from the smallest to the largest model at the largest data size, per group."""
    parts = []
    for m in measured(doc, metric):
        points = sorted((n, y) for n, y, top in zip(m["n"], m["y"], m["largest"], strict=True) if top and n)
        if len(points) > 1 and points[-1][0] > points[0][0]:
            parts.append(f"{label_of(m['group'])} {digits(points[0][1], 3)} → {digits(points[-1][1], 3)}")
    return f"{title_of(metric).capitalize()} from the smallest to the largest model: {'; '.join(parts)}." if parts else None


def _best_sentence(doc: Document, metric: str) -> str | None:
    best = None
    for m in measured(doc, metric):
        for y, n in zip(m["y"], m["n"], strict=True):
            if best is None or (y > best[0] if m["kind"] == "score" else y < best[0]):
                best = (y, n, label_of(m["group"]))
    if best is None:
        return None
    where = f" at {best[1]:,.0f} parameters" if best[1] else ""
    return f"Best {title_of(metric)}: {digits(best[0])} by {best[2]}{where}."


def summary(doc: Document) -> list[str]:
    """The report's first lines: what moved, what is best, which exponents the data carry."""
    metric = doc["headline_metric"]
    out = [_fall_sentence(doc, metric), *_loss_sentence(doc, metric)]
    for other in ("fd", "fid", "geneval"):
        if measured(doc, other):
            out += [_fall_sentence(doc, other), _best_sentence(doc, other)]
    if doc.get("verdicts"):
        counts = {s: sum(v["verdict"] == s for v in doc["verdicts"]) for s in ("holds", "reversed", "undecided", "not measured")}
        out.append(f"Of {len(doc['verdicts'])} published claims, " + ", ".join(f"{n} {s}" for s, n in counts.items()) + ".")
    if doc["refused"] and not doc["fits"]:
        out.append("No law was fitted: " + doc["refused"][0]["message"] + ".")
    return [s for s in out if s]


def law_rows(doc: Document) -> list[dict[str, str]]:
    """The table of fitted laws, one row a fit."""
    rows = []
    for f in doc["fits"]:
        params = "; ".join(f"{k} {digits(v)}" + (" (fixed)" if k in f["fixed"] else "") for k, v in f["params"].items())
        exponents = [k for k in f["intervals"] if k in ("alpha", "beta", "alpha_N", "alpha_D", "delta", "slope")]
        rows.append({
            "group": label_of(f["group"]), "metric": title_of(f["metric"]), "law": f["law"], "axes": ", ".join(f["axes"]).upper(),
            "params": params, "intervals": "; ".join(f"{k} {span(f['intervals'][k])}" for k in exponents),
            "runs": f"{f['n_runs']} ({f['n_clusters']})", "aicc": digits(f["aicc"]),
            "carried": "yes" if f["headline"] else "–" if f["law"] == "logit" else "no",
            "warnings": ", ".join(w["code"] for w in f["warnings"]),
        })  # fmt: skip
    return rows


