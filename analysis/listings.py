"""The report's tables: headers and rows of text, made from laws.json, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.beside import is_flat
from analysis.figures import arms, headline_metrics, telling
from analysis.names import label_of, members_of, title_of
from analysis.panels import short
from analysis.refusals import gathered
from analysis.table import is_part
from analysis.words import capital, digits, percent, rounded, span

Document = dict[str, Any]
EXPONENTS = ("alpha", "beta", "alpha_N", "alpha_D", "delta", "slope")


@dataclass(frozen=True)
class Listing:
    """A table: `note` says how to read it."""

    title: str
    note: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def glance(doc: Document) -> Listing:
    """One row an arm: what the ladder did to each headline metric."""
    metrics = [m for m in headline_metrics(doc) if m != "val_nll"]
    groups = {label_of(m["group"]): m["group"] for m in doc["measurements"]}
    flat, rows = is_flat(doc), []
    for label, group in groups.items():
        cells = [label]
        for metric in metrics:
            m = next((m for m in doc["measurements"] if m["metric"] == metric and m["group"] == group), None)
            cells += [_ends(m)] if flat else [_ends(m), _per_doubling(doc, metric, group)]
        rows.append(cells)
    beside = [] if flat else ["per doubling of N"]
    headers = ["", *(h for m in metrics for h in (capital(title_of(m)), *beside))]
    note = (
        "From the smallest to the largest model at the largest data size, or of one model size from the fewest to the "
        "most images; means of seeds; change per doubling with its interval."
    )
    return Listing("At a glance", "Means of seeds." if flat else note, headers, rows)


def _ends(m: Document | None) -> str:
    """The first and the last rung of the ladder, each the mean of its seeds."""
    if m is None:
        return "–"
    rungs: dict[float, list[float]] = {}
    for x, y, top in zip(m[m.get("rung_axis", "n")], m["y"], m["largest"], strict=True):
        if top:
            rungs.setdefault(x or 0.0, []).append(y)
    means = [sum(values) / len(values) for _, values in sorted(rungs.items())]
    return f"{digits(means[0])} → {digits(means[-1])}" if len(means) > 1 else digits(means[0])


def _per_doubling(doc: Document, metric: str, group: dict[str, str]) -> str:
    for d in doc["doublings"]:
        if d["metric"] == metric and d["group"] == group:
            middle, low, high = d["change"]
            half, unit = (high - low) / 2, 1.0 if d["kind"] == "score" else 100.0
            return rounded(unit * middle, unit * half, sign=True) + ("" if d["kind"] == "score" else " %")
    return "–"


def laws(doc: Document) -> Listing:
    rows = []
    for f in doc["fits"]:
        params = "; ".join(f"{k} {digits(v)}" + (" (fixed)" if k in f["fixed"] else "") for k, v in f["params"].items())
        ends = "; ".join(f"{k} {span(f['intervals'][k])}" for k in f["intervals"] if k in EXPONENTS)
        carried = ", ".join(f["headline"]) or ("–" if f["law"] == "logit" else "none")
        codes = ", ".join(w["code"] for w in f["warnings"])
        runs = f"{f['n_runs']} ({f['n_clusters']})"
        rows.append((label_of(f["group"]), title_of(f["metric"]), f["law"], ", ".join(f["axes"]).upper(), params, ends,
                     runs, digits(f["aicc"]), carried, codes))  # fmt: skip
    note = (
        "Carried: the exponents that may stand in a headline (half-width at most .1, no blocking remark); the others "
        "are not carried by the data. Runs: rows (independent trunks)."
    )
    headers = ("arm", "metric", "law", "axes", "parameters", "intervals", "runs", "AICc", "carried", "remarks")
    return Listing("Every law", note, headers, rows)


def remarks(doc: Document) -> Listing:
    seen: dict[tuple[str, str], list[str]] = {}
    for f in doc["fits"]:
        for w in f["warnings"]:
            seen.setdefault((w["code"], w["message"]), []).append(f"{label_of(f['group'])} {title_of(f['metric'])}")
    rows = [(code, message, "; ".join(dict.fromkeys(where))) for (code, message), where in seen.items()]
    return Listing("Remarks and refusals", "", ("code", "what", "where"), [*rows, *gathered(doc)])


def choice(doc: Document) -> Listing:
    rows = []
    # Of a metric of which no law was fitted in an arm the refusals say why.
    fitted = {(label_of(f["group"]), f["metric"]) for f in doc["fits"]}
    for r in (r for r in doc["law_choice"] if (label_of(r["group"]), r["metric"]) in fitted):
        found, common = r.get("rollout"), r.get("common")
        rows.append((
            label_of(r["group"]), title_of(r["metric"]), r["law"], str(r.get("n_runs", "–")), digits(r.get("aicc")),
            percent(found["rms_relative_error"]) if found else r.get("code", "–"),
            f"{found['covered']} of {found['n']}" if found else "–",
            f"{percent(common['rms_relative_error'])} ({common['n']})" if common else "–",
            "least error" if r["chosen"] else "",
        ))  # fmt: skip
    note = (
        "Each law was fitted on the smaller sizes and asked for the next one. Laws are told apart by the rows that "
        "all of them were asked for, at two sizes or more; AICc compares laws of the same runs."
    )
    headers = ("arm", "metric", "law", "runs", "AICc", "held-out error", "covered", "on common rows (how many)", "")
    return Listing("Which law predicts", note, headers, rows)


def predictions(doc: Document) -> Listing:
    rows = []
    for p in doc.get("predictions", {}).get("predictions", []):
        covered = {True: "yes", False: "no", None: "waiting"}[p["covered"]]
        place = ", ".join(f"{axis.upper()} {short(p['target'][axis])}" for axis in ("n", "d") if axis in p["target"])
        rows.append((label_of(p["group"]), title_of(p["metric"]), place, digits(p["predicted"]), span(p["interval"]),
                     digits(p["measured"]), covered, f"{p['decades']:.2f}",
                     p["made_at"], p["rows_sha256"][:12]))  # fmt: skip
    note = (
        "Made from the smaller sizes alone; the hash is that of the rows used. None is ever rewritten, and each is "
        "scored once, by the first table that holds its run."
    )
    headers = ("arm", "metric", "place", "predicted", "new run", "measured", "covered", "decades", "made", "rows")
    return Listing("Predictions on record", note, headers, rows)


def calibration(doc: Document) -> Listing:
    """How the predictions on record have fared, day by day."""
    rows = []
    for day in doc.get("predictions", {}).get("history", []):
        share = day["covered_so_far"] / day["scored_so_far"]
        counts = (str(day[k]) for k in ("scored", "covered", "in_advance"))
        so_far = f"{day['covered_so_far']} of {day['scored_so_far']}"
        rows.append((day["date"], *counts, so_far, percent(share)))
    note = (
        f"Of the runs predicted and measured so far, how many fell into their {100 * doc['level']:g} % interval: each "
        "counts once a metric, by the latest prediction made before it was scored. They share models and are not "
        "independent, so the share has no interval. In advance: made before the run that they speak of had finished."
    )
    headers = ("scored on", "targets", "covered", "in advance", "so far", "share")
    return Listing("Calibration over time", note, headers, rows)


def crossings(doc: Document) -> Listing:
    rows = []
    for c in doc["crossings"]:
        at = "they do not meet" if c["at"] is None else f"{c['axis'].upper()} = {digits(c['at'])}"
        where = "" if c["at"] is None else "in the data" if c["inside_data"] else "extrapolated"
        rows.append((c["a"], c["b"], title_of(c["metric"]), c["axis"].upper(), at, span(c["interval"]), where,
                     percent(c["share_of_draws"]), ", ".join(digits(v) for v in c["by_seed"].values() if v) or "–",
                     span(c["paired_interval"])))  # fmt: skip
    note = (
        "Where the laws of two arms meet. Draws: the share of parameter draws in which they meet at all; no interval "
        "where that is less than half, or where they meet on either side of the laws' own place. By seed: the laws of "
        "each common seed alone, whose runs saw the same data in the same order; an interval from three on."
    )
    headers = ("arm", "other arm", "metric", "axis", "meet at", "interval", "where", "draws", "by seed", "over seeds")
    return Listing("Where one arm overtakes another", note, headers, rows)


def chances(doc: Document) -> Listing:
    rows = []
    for c in doc["chances"]:
        if c["axis"] != "c":
            continue
        ranked = sorted(c["chance"].items(), key=lambda pair: -pair[1])
        rows.append((title_of(c["metric"]), f"{c['at']:.3g}", f"{c['decades']:.1f}",
                     ", ".join(f"{arm} {100 * p:.1f} %" for arm, p in ranked)))  # fmt: skip
    headers = ("metric", "compute (FLOPs)", "decades beyond", "probability of being best")
    return Listing("Best arm at a compute", "Only metrics of one unit are compared.", headers, rows)


def contrasts(doc: Document) -> Listing:
    rows = []
    for c in telling(doc, doc["contrasts"]):
        if is_part(c["metric"]):
            continue
        sign = {1: "a above b", -1: "a below b", 0: "not told apart"}[c["sign"]]
        by = " and ".join(("size", *c["paired_by"]))
        rows.append((c["a"], c["b"], title_of(c["metric"]), c["at"], digits(c["effect"]), span((c["low"], c["high"])),
                     sign, by, digits(c["error"]), digits(c["error_unpaired"])))  # fmt: skip
    note = (
        "Scores: difference; losses and distances: difference of logs, about a relative one. Runs of one seed saw the "
        "same data in the same order; a score is paired prompt by prompt where per_prompt.parquet lies beside the "
        "table, and then its error without that pairing stands in the last column."
    )
    headers = ("a", "b", "metric", "sizes", "a − b", "interval", "reading", "paired by", "error", "unpaired")
    return Listing("Arm against arm", note, headers, rows)


def matches(doc: Document) -> Listing:
    rows = []
    for m in telling(doc, doc.get("matched", [])):
        values = " and ".join(digits(v) for v in m["values"])
        effects = [f"{digits(e[0])} {span(e[1:])}" if e else "–" for e in (m["effect"], m["net_effect"])]
        # without a column of data sizes, equal images are equal rungs alone
        at = "–" if m["at"] is None else short(m["at"])
        rows.append((m["a"], m["b"], title_of(m["metric"]), m["matched"], at, values, *effects))
    note = (
        "Equal images: runs of the largest rung and data size that both have. Equal parameters (head and vocabulary "
        "counted) and equal training FLOPs: law against law, at the most that both have measured. Scores: difference; "
        "losses and distances: difference of logs. Net: a distance less its tokenizer's reconstruction floor, a score "
        "as a share of its ceiling."
    )
    headers = ("a", "b", "metric", "equal", "at", "a and b", "a − b", "net of the tokenizers")
    return Listing("Arms at equal images, parameters and compute", note, headers, rows)


def compositions(doc: Document) -> Listing:
    rows = []
    for c in doc.get("composition", []):
        for s in c["sizes"]:
            trend = c["trend"] if s is c["sizes"][-1] else None
            moves = f"{digits(trend[0])} {span(trend[1:])}" if trend else ""
            gap, odds = (f"{digits(s[k][0])} {span(s[k][1:])}" for k in ("gap", "log_odds_gap"))
            rows.append((label_of(c["group"]), short(s["n"]), digits(s["seen"]), digits(s["unseen"]), gap, odds, moves))
    note = (
        "On the tags that both have: combinations of class, colour and relation that training held out against those "
        "it saw, at the largest data size. Scores are bounded, so whether the gap closes is judged by the log odds: "
        "their change per doubling of N stands beside the largest size."
    )
    headers = ("arm", "N", "seen", "held out", "gap", "gap in log odds", "per doubling of N")
    return Listing("Held-out combinations", note, headers, rows)


def links(doc: Document) -> Listing:
    rows = []
    for k in doc["links"]:
        r = k["pearson"]
        show = percent if k["error_is"] == "relative" else digits
        rows.append((
            label_of(k["group"]), title_of(k["metric"]), str(k["n"]), digits(k["slope"]),
            f"{r[0]:.4f} {span(r[1:])}" if r else "–", digits(k["published_r"]), show(k["error_in_sample"]),
            show(k["error_held_out"]), show(k["error_chained"]),
        ))  # fmt: skip
    note = (
        "A straight line per arm, never pooled. Held out: the next size, at its measured loss; chained: at the "
        "loss predicted for it. The published r is Fluid's, random order with continuous tokens."
    )
    headers = ("arm", "metric", "sizes", "slope", "Pearson r", "published r", "in sample", "held out", "chained")
    return Listing("From loss to metric", note, headers, rows)


def ceilings(doc: Document) -> Listing:
    rows = []
    for c in doc["ceilings"]:
        at = f"{c['x'][-1]:.3g}"
        rows.append((label_of(c["group"]), title_of(c["metric"]), digits(c["ceiling"], 2), at, digits(c["mean"][-1])))
    note = (
        "The score a decade of compute beyond the data under two ceilings: what the ceiling decides, no fit can narrow."
    )
    return Listing("Ceilings", note, ("arm", "metric", "ceiling", "C (FLOPs)", "score there"), rows)


def allocations(doc: Document) -> Listing:
    rows = []
    for a in doc["allocation"]:
        trained = [b for b in a["budgets"] if b["decades"] == 0][-1]
        for b in (trained, a["budgets"][-1]):
            rows.append((
                label_of(a["group"]), title_of(a["metric"]), f"{b['c']:.3g}", f"{b['decades']:.1f}", digits(b["n"]),
                span(b["n_interval"]), digits(b["d"]), span(b["d_interval"]),
                f"{digits(a['exponent'][0])} {span(a['exponent'][1:])}",
            ))  # fmt: skip
    note = "From the joint law in N and D, with this ladder's own cost of a run. The exponent is that of N* in C."
    headers = ("arm", "metric", "C (FLOPs)", "decades beyond", "N*", "interval", "D*", "interval", "exponent")
    return Listing("Best split of a budget", note, headers, rows)


def isoflops(doc: Document) -> Listing:
    rows = []
    for p in doc["isoflop"]:
        vertex = digits(p.get("n_star")) if "n_star" in p else "–"
        rows.append((label_of(p["group"]), title_of(p["metric"]), f"{p['c']:.3g}", str(len(p["n"])), vertex,
                     span(p.get("interval")), digits(p.get("joint_n_star")), p.get("message", "")))  # fmt: skip
    headers = ("arm", "metric", "C (FLOPs)", "sizes", "vertex N*", "interval", "joint law's N*", "remark")
    return Listing("Profiles at equal compute", "A cross-check on the joint law, never the estimate.", headers, rows)


def sensitivities(doc: Document) -> Listing:
    rows = []
    for r in doc["sensitivity"]:
        found = r.get("exponents", {})
        text = "; ".join(f"{k} {digits(v[0])} {span(v[1:])}" for k, v in found.items()) or f"[{r.get('code')}]"
        rows.append((label_of(r["group"]), r["law"], r["choice"], str(r.get("n_runs", "–")), text))
    note = "The same law under other choices: objective, dropped sizes, what counts as a parameter."
    return Listing("Sensitivity", note, ("arm", "law", "choice", "runs", "exponents"), rows)


def noise(doc: Document) -> Listing:
    rows = []
    for n in doc["noise"]:
        known = n["standard_deviation"] is not None
        dof = str(n["dof"]) if known else "no replicates"
        where = members_of(n["groups"], arms(doc)) or "–"
        ends = (f"{u['group']} {digits(u['standard_deviation'])} ({u['dof']})" for u in n.get("unlike", ()))
        rows.append((title_of(n["metric"]), n.get("unit") or "–", digits(n["standard_deviation"]), dof, where,
                     " against ".join(ends) or "–"))  # fmt: skip
    note = (
        "Standard deviation between seeds: relative for losses and distances, in points for scores. Evaluations share "
        "their draws, so it holds what is left of the evaluation's error between two models. No interval of a law of "
        "the metric rests on less; with no replicates it rests on the scatter around the law alone. Degrees of freedom "
        "count trunks, not their branches. Unlike: arms whose variances clearly differ; each law is then held to its "
        "own arm's seeds, where it has some."
    )
    headers = ("metric", "unit", "between seeds", "degrees of freedom", "replicated in", "unlike")
    return Listing("Seed noise", note, headers, rows)


def rollouts(doc: Document) -> Listing:
    """The largest size as each law, fitted on the smaller ones, predicted it."""
    rows = []
    for f in doc["fits"]:
        if not f["rollout"] or is_part(f["metric"]):
            continue
        axis = "n" if f["rollout"][0]["held_out"]["n"] else f["axes"][0]
        top = max(e["held_out"][axis] for e in f["rollout"])
        for e in (e for e in f["rollout"] if e["held_out"][axis] == top):
            low, high = e["interval"]
            half = (high - low) / 2 / abs(e["predicted"]) if f["metric"] != "val_nll" else None
            rows.append((label_of(f["group"]), title_of(f["metric"]), f["law"], ", ".join(f["axes"]).upper(),
                         str(e["n_runs"]), digits(e["predicted"]), digits(e["measured"]), percent(e["relative_error"]),
                         percent(half), "yes" if e["covered"] else "no"))  # fmt: skip
    note = "Fitted without the largest size, asked for it; the interval is that of a new run, as a share of the value."
    headers = ("arm", "metric", "law", "axes", "runs", "predicted", "measured", "error", "half-width", "covered")
    return Listing("The largest size, predicted from the smaller ones", note, headers, rows)


def runs(doc: Document) -> Listing:
    headers = ("row", "run", "arm", "size", "N", "D", "C", *(title_of(m) for m in headline_metrics(doc)))
    values: dict[int, dict[str, Any]] = {}
    for m in doc["measurements"]:
        for i, row in enumerate(m["row"]):
            place = {"group": m["group"], "size": m["size"][i], "n": m["n"][i], "d": m["d"][i], "c": m["c"][i]}
            entry = values.setdefault(row, {"place": place})
            entry[m["metric"]] = digits(m["y"][i]) + (f" ± {digits(m['se'][i], 2)}" if m["se"][i] else "")
    rows = []
    for row in sorted(values):
        place = values[row]["place"]
        numbers = (digits(place[k], 6) if k == "n" else f"{place[k]:.6g}" if place[k] else "–" for k in ("n", "d", "c"))
        cells = (values[row].get(m, "") for m in headline_metrics(doc))
        rows.append((str(row), _run_link(doc, row), label_of(place["group"]), place["size"], *numbers, *cells))
    return Listing("Runs", "± is the evaluation's standard error.", headers, rows)


class Link(str):
    """A cell that leads somewhere."""

    href = ""


def _run_link(doc: Document, row: int) -> str:
    """The run's name, leading to its folder where that was found beside the table."""
    name = doc["runs"]["ids"].get(str(row), "")
    if not name or not doc["runs"]["folder"]:
        return name
    link = Link(name)
    link.href = f"{doc['runs']['folder']}/{name}/"
    return link


def excluded(doc: Document) -> Listing:
    rows = [(str(e["row"]), e["run_id"], e["code"], e["reason"]) for e in doc["table"]["excluded"]]
    return Listing("Left out", "", ("row", "run", "code", "why"), rows)


def verdicts(doc: Document) -> list[dict[str, str]]:
    """The claims, with effect and interval as text; first those that the table decides."""
    order = {"holds": 0, "reversed": 1, "undecided": 2, "not measured": 3}
    out = []
    for v in sorted(doc["verdicts"], key=lambda v: (order[v["verdict"]], v["number"])):
        effect = "" if v["effect"] is None else f"{digits(v['effect'])} {span(v['interval'])}"
        rows = v["evidence"]["rows"]
        shown = ", ".join(map(str, rows[:12])) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")
        known = v["detectable"] is not None and v["verdict"] == "undecided"
        power = f"an effect of {digits(v['detectable'])} would have been seen four times in five" if known else ""
        out.append({"number": str(v["number"]), "claim": v["claim"], "verdict": v["verdict"], "effect": effect,
                    "power": power,
                    "text": capital(v["evidence"]["text"]), "rows": shown})  # fmt: skip
    return out
