"""The report's figures, drawn from laws.json alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.names import heading_of, label_of, name_of, title_of
from analysis.panels import MUTED, colour, grid, log_axis, marker, short
from analysis.settings import differ_in_one
from analysis.table import is_part

AXIS_NAMES = {"n": "parameters N", "d": "training images D", "c": "training compute C (FLOPs)"}
# more names than these find no place that hides no point
FEW_NAMES = 4
Document = dict[str, Any]


def axis_name(doc: Document, axis: str) -> str:
    """The axis' name; tables of others keep their own column's name."""
    column = doc["table"]["columns"][axis]
    own = {"n": "params_total", "d": "images", "c": "train_flops"}
    return AXIS_NAMES[axis] if column in (None, own[axis]) else str(column)


def arms(doc: Document) -> list[str]:
    return list(groups_of(doc))


def groups_of(doc: Document) -> dict[str, dict[str, str]]:
    """What makes each group, by its name."""
    return {name_of(m["group"]): m["group"] for m in doc["measurements"]}


def telling(doc: Document, comparisons: list[Document]) -> list[Document]:
    """Comparisons of two groups that say what made the difference."""
    groups = groups_of(doc)
    return [c for c in comparisons if differ_in_one(groups[c["a"]], groups[c["b"]])]


def measured(doc: Document, metric: str) -> list[Document]:
    return [m for m in doc["measurements"] if m["metric"] == metric]


def fits_of(doc: Document, metric: str, axis: str) -> list[Document]:
    """One-axis fits of a metric along an axis."""
    return [f for f in doc["fits"] if f["metric"] == metric and f["axes"] == [axis] and f["curve"]]


def headline_metrics(doc: Document) -> list[str]:
    """The metrics measured, parts of the score left out."""
    return [m for m in dict.fromkeys(m["metric"] for m in doc["measurements"]) if not is_part(m)]


def is_data_ladder(doc: Document, metric: str) -> bool:
    """Whether a metric was measured on several data sizes of one model size, in every arm."""
    return all(m.get("rung_axis") == "d" for m in measured(doc, metric))


def _array(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)


def _draw_points(ax: Axes, doc: Document, item: Document, axis: str, alone: bool) -> None:
    x, y, se = (_array(item[k]) for k in (axis, "y", "se"))
    largest = np.array(item["largest"], bool)
    tint = colour(item["group"], arms(doc))
    style: dict[str, Any] = {"marker": marker(item["group"]), "color": tint, "linestyle": "none"}
    if (~largest).any():
        ax.plot(x[~largest], y[~largest], markersize=3, alpha=0.35, markeredgewidth=0, **style)
    bars = np.where(np.isfinite(se[largest]), 1.96 * se[largest], 0.0)
    label = None if alone else label_of(item["group"])
    ax.errorbar(x[largest], y[largest], bars, markersize=4.5, elinewidth=0.9, capsize=0, label=label, zorder=3, **style)


def _draw_curve(ax: Axes, doc: Document, item: Document, reach: float) -> None:
    curve, tint = item["curve"], colour(item["group"], arms(doc))
    x, mean, low, high = (_array(curve[k]) for k in ("x", "mean", "low", "high"))
    values = _array(item["points"][item["axes"][0]])
    last, first = values.max(), values.min()
    keep = (x <= last * reach) & (x >= first / 1.6)
    inside = keep & (x <= last * 1.02)
    ax.plot(x[inside], mean[inside], color=tint, linewidth=1.4)
    ax.plot(x[keep & (x >= last)], mean[keep & (x >= last)], color=tint, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.fill_between(x[keep], low[keep], high[keep], color=tint, alpha=0.13, linewidth=0)


def _limits(items: list[Document], fits: list[Document], reach: float) -> tuple[float, float]:
    """y limits from the points and the mean curves; a band that explodes must not flatten everything else."""
    values = [v for m in items for v in m["y"]] + [e["predicted"] for f in fits for e in f["rollout"]]
    for f in fits:
        x, last = _array(f["curve"]["x"]), _array(f["points"][f["axes"][0]]).max()
        values += [v for v in _array(f["curve"]["mean"])[x <= last * reach] if np.isfinite(v)]
    low, high = min(values), max(values)
    if items[0]["kind"] == "score":
        best = max([high, *(m["ceiling"] for m in items if m["ceiling"])])
        return max(0.0, low - 0.06), min(1.06, best + 0.07)
    if low <= 0:
        # One value alone has no range of its own.
        pad = 0.08 * ((high - low) or abs(high) or 1.0)
        return low - pad, high + pad
    pad = (high / low) ** 0.12 if high > low else 1.1
    return low / pad, high * pad


def _floors(ax: Axes, items: list[Document]) -> None:
    """Reconstruction floor of a distance, the tokenizer's ceiling of a score: what no model of that kind can pass."""
    kinds = {item["group"].get("token_kind", ""): item for item in items}
    for key, text in (("floor", "tokenizer floor"), ("ceiling", "tokenizer ceiling")):
        # Two lines are often close: the lower one is named below itself, the upper one above.
        lines = sorted(kinds.values(), key=lambda item: item[key] or 0.0)[-2:]
        # where curves of that kind are far away: floors on the left, ceilings on the right
        edge, side = (0.01, "left") if key == "floor" else (0.995, "right")
        for place, item in zip(("top", "bottom"), lines, strict=False):
            low, high = ax.get_ylim()
            if item[key] is not None and low <= item[key] <= high:
                ax.axhline(item[key], color=MUTED, linewidth=0.9, linestyle=":")
                label = f"{text}, {item['group'].get('token_kind', '')}".rstrip(", ")
                ax.annotate(label, (edge, item[key]), xycoords=("axes fraction", "data"), fontsize=6, color=MUTED,
                            ha=side, va=place)  # fmt: skip


def by_unit(items: list[Document]) -> list[list[Document]]:
    """Measurements that share a unit share a panel; losses of unlike units never share an axis."""
    panels: dict[tuple[str, ...], list[Document]] = {}
    for item in items:
        kind = item["group"].get("token_kind", "")
        panels.setdefault((item["unit"], kind if item["kind"] in ("loss", "signed") else ""), []).append(item)
    return list(panels.values())


def _held_out(ax: Axes, doc: Document, fits: list[Document], axis: str) -> None:
    """What the smaller rungs alone said of each rung, with the interval of a new run; faint where it fills the panel.

    Arms stand side by side, so that their bars do not hide each other.
    """
    bottom, top = ax.get_ylim()
    for k, f in enumerate(fits):
        for e in f["rollout"]:
            low, high = e["interval"]
            wide = low < bottom or high > top
            tint = colour(f["group"], arms(doc))
            ax.errorbar(e["held_out"][axis] * 1.06 * 1.035**k, e["predicted"],
                        [[e["predicted"] - low], [high - e["predicted"]]], marker="D", markersize=3.6,
                        markerfacecolor="white", color=tint, elinewidth=0.5 if wide else 0.8,
                        alpha=0.35 if wide else 0.8, linestyle="none", zorder=2 if wide else 4)  # fmt: skip


def _ceilings(ax: Axes, doc: Document, metric: str, axis: str, names: set[str]) -> None:
    """Beyond the data: the law under the lowest and the highest ceiling, whose spread no fit can narrow."""
    if axis != "c":
        return
    for name in sorted(names):
        mine = [c for c in doc["ceilings"] if c["metric"] == metric and name_of(c["group"]) == name]
        if len(mine) < 2:
            continue
        x, last = _array(mine[0]["x"]), max(v for m in measured(doc, metric) for v in m["c"])
        beyond = x >= last
        low, high = (_array(c["mean"])[beyond] for c in (mine[-1], mine[0]))
        tint = colour(mine[0]["group"], arms(doc))
        ax.fill_between(x[beyond], low, high, facecolor="none", edgecolor=tint, alpha=0.35, hatch="////", linewidth=0)


def _panel(ax: Axes, doc: Document, metric: str, axis: str, members: list[Document], reach: float) -> None:
    names = {name_of(m["group"]) for m in members}
    fits = [f for f in fits_of(doc, metric, axis) if name_of(f["group"]) in names]
    for f in fits:
        _draw_curve(ax, doc, f, reach)
    _ceilings(ax, doc, metric, axis, names)
    for m in members:
        _draw_points(ax, doc, m, axis, len(members) == 1)
    overlaid = [o for o in doc.get("overlay", []) if o["metric"] == metric and axis == "n"]
    for o in overlaid:
        ax.plot(o["n"], o["y"], "*:", color=MUTED, markersize=5, linewidth=0.8, label=o["label"] + " (its protocol)")
    x = np.concatenate([*(_array(m[axis]) for m in members), *(_array(o["n"]) for o in overlaid)])
    right = np.nanmax(x) * (reach if fits else 1.3)
    if fits:
        ax.axvspan(np.nanmax(x) * 1.1, right, color="#f3f5f7", zorder=0, linewidth=0)
        ax.annotate("extrapolation", (0.985, 0.015), xycoords="axes fraction", fontsize=6.5, color=MUTED, ha="right")
    ax.set_xscale("log")
    ax.set_xlim(np.nanmin(x) / 1.4, right)
    low, high = _limits(members, fits, reach)
    if members[0]["kind"] not in ("score", "signed"):
        ax.set_yscale("log")
        log_axis(ax.yaxis, low, high)
    ax.set_ylim(low, high)
    _held_out(ax, doc, fits, axis)
    ax.set_ylim(low, high)
    log_axis(ax.xaxis, *ax.get_xlim(), compute=axis == "c")
    _floors(ax, members)
    unit = members[0]["unit"]
    kinds = {m["group"].get("token_kind", "") for m in members}
    ax.set_title(next(iter(kinds)) if len(kinds) == 1 and kinds != {""} else title_of(metric))
    ax.set_xlabel(axis_name(doc, axis))
    ax.set_ylabel(f"{title_of(metric)}" + (f"\n({unit})" if unit else ""))
    if len(members) + len(overlaid) > FEW_NAMES:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    elif len(members) > 1 or overlaid:
        ax.legend(loc="best")


def metric_along(doc: Document, metric: str, axis: str, reach: float = 4.0) -> Figure | None:
    """One metric against N or C: points with 95 % error bars, law, band, shaded extrapolation up to `reach` times.

    Small pale points are smaller data sizes; open diamonds are what the smaller rungs alone predicted.
    """
    items = [m for m in measured(doc, metric) if np.isfinite(_array(m[axis])).any()]
    if not items:
        return None
    panels = by_unit(items)
    single = len(panels) == 1
    figure, axes = grid(len(panels), width=4.2 if single else 3.5, height=3.3 if single else 3.0)
    for ax, members in zip(axes, panels, strict=True):
        _panel(ax, doc, metric, axis, members, reach)
    return figure


def along_data(doc: Document, metric: str) -> Figure | None:
    """The metric against data size, a line a model size, for arms with three data sizes or more."""
    found = [m for m in measured(doc, metric) if len({d for d in m["d"] if d}) >= 3]
    items = [m for m in found if np.isfinite(_array(m["n"])).all()]
    if not items:
        return None
    figure, axes = grid(len(items), columns=4, width=2.3, height=2.5)
    for ax, m in zip(axes, items, strict=True):
        n, d, y = (_array(m[k]) for k in ("n", "d", "y"))
        sizes = np.unique(n)
        for i, size in enumerate(sizes):
            here = (n == size).nonzero()[0]
            here = here[np.argsort(d[here])]
            tint = colour(m["group"], arms(doc))
            ax.plot(d[here], y[here], marker(m["group"]) + "-", color=tint, markersize=3.5, linewidth=1,
                    alpha=0.35 + 0.65 * i / max(len(sizes) - 1, 1))  # fmt: skip
            ax.annotate(m["size"][here[-1]] or short(size), (d[here[-1]], y[here[-1]]), xytext=(4, 0), fontsize=6,
                        textcoords="offset points", va="center", color=MUTED)  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlim(d.min() / 1.15, d.max() * 1.6)
        log_axis(ax.xaxis, d.min() / 1.15, d.max() * 1.6)
        if m["kind"] not in ("score", "signed"):
            ax.set_yscale("log")
            log_axis(ax.yaxis, *ax.get_ylim())
        ax.tick_params(labelsize=6.5)
        ax.set_title(heading_of(m["group"]), fontsize=8)
        ax.set_xlabel(axis_name(doc, "d"), fontsize=7)
    axes[0].set_ylabel(title_of(metric), fontsize=7.5)
    return figure


def tags(doc: Document) -> Figure | None:
    """The score's tags against N, one small panel a tag."""
    names = [m for m in dict.fromkeys(m["metric"] for m in doc["measurements"]) if is_part(m)]
    if not names:
        return None
    figure, axes = grid(len(names), columns=4, width=2.1, height=2.1, sharey=True)
    for ax, metric in zip(axes, names, strict=True):
        for f in fits_of(doc, metric, "n"):
            _draw_curve(ax, doc, f, 1.3)
        for m in measured(doc, metric):
            _draw_points(ax, doc, m, "n", False)
        ax.set_xscale("log")
        log_axis(ax.xaxis, *ax.get_xlim())
        ax.set_title(title_of(metric), fontsize=8)
        ax.tick_params(labelsize=6.5)
        ax.set_ylim(0, 1.02)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure
