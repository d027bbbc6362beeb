"""Figures about the laws themselves: links, allocation, isoFLOP profiles, residuals, learning curves, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import Document, arms, axis_name
from analysis.names import heading_of, label_of, name_of, title_of
from analysis.panels import INK, MUTED, colour, dress_small, grid, log_axis, marker, shade

FIT_LINE: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.8}
# an interval for N* or D* wider than this factor says only that the ladder cannot place the optimum
WIDEST_BAND = 100.0


def _style(doc: Document, item: Document) -> dict[str, Any]:
    return {"color": colour(item["group"], arms(doc)), "marker": marker(item["group"])}


def links(doc: Document) -> Figure | None:
    """Metric against loss: a panel per metric and unit of loss, a straight line per arm."""
    panels: dict[tuple[str, str], list[Document]] = {}
    for item in doc["links"]:
        panels.setdefault((item["metric"], item["group"].get("token_kind", "")), []).append(item)
    if not panels:
        return None
    figure, axes = grid(len(panels), columns=2, height=3.0)
    for ax, ((metric, kind), items) in zip(axes, sorted(panels.items()), strict=True):
        for item in items:
            x, y = np.array(item["points"]["loss"]), np.array(item["points"]["value"])
            r = f", r = {item['pearson'][0]:.3f}" if item["pearson"] else ""
            ax.plot(x, y, linestyle="none", markersize=4.5, label=label_of(item["group"]) + r, **_style(doc, item))
            ends = np.array([x.min(), x.max()])
            tint = colour(item["group"], arms(doc))
            ax.plot(ends, item["intercept"] + item["slope"] * ends, color=tint, **FIT_LINE)
        ax.invert_xaxis()
        ax.set_title(kind or title_of(metric))
        ax.set_xlabel("validation loss (falls to the right)")
        ax.set_ylabel(title_of(metric))
        # Below the panel: inside, its long lines leave no place that is free of points.
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure


def allocation(doc: Document) -> Figure | None:
    """N*(C) and D*(C) of the joint laws, a row a metric, with bands, inside the range of budgets that were trained."""
    metrics = list(dict.fromkeys(a["metric"] for a in doc["allocation"]))
    if not metrics:
        return None
    figure, axes = grid(2 * len(metrics), height=2.6)
    for k, ax in enumerate(axes):
        items = [a for a in doc["allocation"] if a["metric"] == metrics[k // 2]]
        _split(ax, doc, items, "nd"[k % 2])
        ax.set_title(title_of(metrics[k // 2]))
    named = {label_of(a["group"]): colour(a["group"], arms(doc)) for a in doc["allocation"]}
    handles = [Line2D([], [], color=tint, linewidth=1.4) for tint in named.values()]
    figure.legend(handles, list(named), loc="outside lower center", ncols=2)
    return figure


def _split(ax: Axes, doc: Document, items: list[Document], key: str) -> None:
    """The best N or D of one metric against C; an interval too wide to draw leaves a dotted line."""
    for item in items:
        tint = colour(item["group"], arms(doc))
        c, best = (np.array([b[k] for b in item["budgets"]], float) for k in ("c", key))
        low, high = np.array([b[f"{key}_interval"] for b in item["budgets"]], float).T
        known = float(np.median(high / low)) <= WIDEST_BAND
        ax.plot(c, best, color=tint, linewidth=1.4, linestyle="-" if known else ":")
        if known:
            ax.fill_between(c, low, high, color=tint, alpha=0.12, linewidth=0)
    top = max(b["c"] for item in items for b in item["budgets"] if b["decades"] == 0)
    ax.axvspan(top, max(b["c"] for b in items[0]["budgets"]), color="#f3f5f7", zorder=0, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    trained = [v for m in doc["measurements"] for v in m[key] if v]
    # an optimum far outside the ladder is an artefact of a badly known exponent
    values = np.clip([b[key] for item in items for b in item["budgets"]], min(trained) / 30, max(trained) * 30)
    ax.set_ylim(min(values) / 3, max(values) * 3)
    log_axis(ax.xaxis, *ax.get_xlim(), compute=True)
    log_axis(ax.yaxis, *ax.get_ylim())
    ax.set_xlabel(axis_name(doc, "c"))
    ax.set_ylabel("best " + axis_name(doc, key))


def isoflop(doc: Document) -> Figure | None:
    """Loss against size at equal compute, with the vertex where the profile has one."""
    items = [p for p in doc["isoflop"] if len(p["n"]) >= 3]
    if not items:
        return None
    names = list(dict.fromkeys(name_of(p["group"]) for p in items))
    figure, axes = grid(len(names), columns=4, width=2.3, height=2.4)
    for ax, name in zip(axes, names, strict=True):
        mine = [p for p in items if name_of(p["group"]) == name]
        for i, p in enumerate(mine):
            n, y = np.array(p["n"]), np.array(p["y"])
            order = np.argsort(n)
            tint, shade = colour(p["group"], arms(doc)), 0.3 + 0.7 * (i + 1) / len(mine)
            ax.plot(n[order], y[order], "o-", color=tint, alpha=shade, markersize=3, linewidth=0.9)
            if "n_star" in p and p.get("code") is None:
                ax.axvline(p["n_star"], color=tint, alpha=shade, linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        log_axis(ax.xaxis, *ax.get_xlim())
        ax.tick_params(labelsize=6.5)
        ax.set_title(heading_of(mine[0]["group"]), fontsize=8)
        ax.set_xlabel(axis_name(doc, "n"), fontsize=7)
    axes[0].set_ylabel(title_of(items[0]["metric"]), fontsize=7.5)
    return figure


def residuals(doc: Document) -> Figure | None:
    """Residuals of the headline metric's laws, in percent, against N: what the law leaves unexplained."""
    chosen = [f for f in doc["fits"] if f["metric"] == doc["headline_metric"] and f["axes"][0] == "n"]
    chosen = [f for f in chosen if f["objective"]["name"].endswith("-log")]
    if not chosen:
        return None
    laws = list(dict.fromkeys(f["law"] for f in chosen))
    figure, axes = grid(len(laws), height=2.5)
    for ax, law in zip(axes, laws, strict=True):
        for f in (f for f in chosen if f["law"] == law):
            jitter = 1.04 ** (arms(doc).index(name_of(f["group"])) - 1.5)
            x, y = np.array(f["points"]["n"]) * jitter, 100 * np.array(f["points"]["residual"])
            ax.plot(x, y, linestyle="none", markersize=4, alpha=0.8, label=label_of(f["group"]), **_style(doc, f))
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_xscale("log")
        log_axis(ax.xaxis, *ax.get_xlim())
        ax.set_title(law)
        ax.set_xlabel(axis_name(doc, "n"))
        ax.set_ylabel("law over measured (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def learning_curves(doc: Document) -> Figure | None:
    """Training loss against images seen, a line a run, darker for larger sizes."""
    curves = doc["learning_curves"]
    if not curves:
        return None
    names = list(dict.fromkeys(name_of(c["group"]) for c in curves))
    sizes = {s: max(n or 0 for n, t in zip(m["n"], m["size"], strict=True) if t == s)
             for m in doc["measurements"] for s in set(m["size"])}  # fmt: skip
    rank = {size: k for k, size in enumerate(sorted(sizes, key=lambda s: sizes[s]), 1)}
    figure, axes = grid(len(names), columns=4, width=2.3, height=2.4)
    for ax, name in zip(axes, names, strict=True):
        own = sorted((c for c in curves if name_of(c["group"]) == name), key=lambda c: rank.get(c["size"], 1))
        for before, c in zip([None, *own], own, strict=False):
            style = {"color": colour(c["group"], arms(doc)), "alpha": shade(rank.get(c["size"], 1), max(len(rank), 1))}
            # one entry a size, however many seeds
            label = c["size"] if before is None or before["size"] != c["size"] else None
            ax.plot(c["images"], c["loss"], linewidth=1, label=label, **style)
        dress_small(ax, heading_of(own[0]["group"]), "images seen")
    axes[0].set_ylabel("training loss", fontsize=7.5)
    return figure


def calibration(doc: Document) -> Figure | None:
    """Every scored prediction on record: measured over predicted, with the interval it was given."""
    scored = [p for p in doc.get("predictions", {}).get("predictions", []) if p["measured"] and p["predicted"]]
    if not scored:
        return None
    figure, (ax,) = grid(1, width=5.2, height=0.22 * len(scored) + 0.9)
    for i, p in enumerate(reversed(scored)):
        low, high = (v / p["predicted"] for v in p["interval"])
        tint = colour(p["group"], arms(doc))
        ax.plot([low, high], [i, i], color=tint, linewidth=3, alpha=0.25, solid_capstyle="butt")
        ax.plot(p["measured"] / p["predicted"], i, marker(p["group"]), color=tint, markersize=4.5)
    names = [f"{title_of(p['metric'])}, {label_of(p['group'])}" for p in reversed(scored)]
    ax.set_yticks(range(len(scored)), names, fontsize=6.5)
    ax.axvline(1, color=MUTED, linewidth=0.8)
    ratios = [p["measured"] / p["predicted"] for p in scored]
    reach = max(1.5 * max(abs(r - 1) for r in ratios), 0.05)
    ax.set_xlim(1 - min(reach, 1.0), 1 + reach)
    ax.set_xlabel("measured / predicted (bar: interval of a new run)")
    return figure
