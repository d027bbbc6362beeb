"""Figures of a sweep of one model size and one data size: its arms and settings side by side, a row each."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import by_unit, measured
from analysis.names import label_of, title_of
from analysis.panels import grid, marker, own_colour
from analysis.table import is_part

Document = dict[str, Any]
# inches; a letter of a row's name
ROW_HEIGHT, MARGIN, LETTER = 0.2, 0.75, 0.05
# how far the seeds of a row stand apart, in rows
SPREAD = 0.32


def is_flat(doc: Document) -> bool:
    """Whether nothing was measured along a size: every group has one place, and there is more than one group."""
    places = [len(set(zip(m["n"], m["d"], strict=True))) for m in doc["measurements"]]
    return len({label_of(m["group"]) for m in doc["measurements"]}) > 1 and max(places, default=0) == 1


def side_by_side(doc: Document, metric: str) -> Figure:
    """The metric of every group: its mean, and pale with their 95 % bars the runs it is of; unlike units apart."""
    panels = by_unit(measured(doc, metric))
    rows = max(len(members) for members in panels)
    figure, axes = grid(len(panels), width=2.6 + _names_width(doc), height=MARGIN + ROW_HEIGHT * rows)
    for ax, members in zip(axes, panels, strict=True):
        _rows(ax, members)
        kinds = {m["group"].get("token_kind", "") for m in members}
        ax.set_title(next(iter(kinds)) if len(kinds) == 1 < len(panels) else title_of(metric))
        unit = members[0]["unit"]
        ax.set_xlabel(title_of(metric) + (f" ({unit})" if unit else ""))
    return figure


def tags(doc: Document) -> Figure | None:
    """The score's tags, one small panel a tag; rows as in `side_by_side`."""
    names = [m for m in dict.fromkeys(m["metric"] for m in doc["measurements"]) if is_part(m)]
    if not names:
        return None
    rows = max(len(measured(doc, metric)) for metric in names)
    columns = min(4, len(names))
    figure, axes = grid(
        len(names), columns=columns, width=1.8 + _names_width(doc) / columns, height=MARGIN + ROW_HEIGHT * rows
    )
    for place, (ax, metric) in enumerate(zip(axes, names, strict=True)):
        _rows(ax, measured(doc, metric))
        ax.set_xlim(0, 1.02)
        ax.tick_params(labelsize=6.5)
        if place % columns:
            ax.set_yticklabels([])
        ax.set_title(title_of(metric), fontsize=8)
    return figure


def _names_width(doc: Document) -> float:
    return LETTER * max(len(label_of(m["group"])) for m in doc["measurements"])


def _rows(ax: Axes, members: list[Document]) -> None:
    for row, m in enumerate(members):
        y = np.array(m["y"], float)
        bars = [0.0 if se is None else 1.96 * se for se in m["se"]]
        places = row + SPREAD * (np.arange(len(y)) - (len(y) - 1) / 2) / max(len(y) - 1, 1)
        style: dict[str, Any] = {"marker": marker(m["group"]), "color": own_colour(m["group"]), "linestyle": "none"}
        alone = len(y) == 1
        ax.errorbar(y, places, xerr=bars, markersize=4.5 if alone else 2.5, alpha=1.0 if alone else 0.45,
                    elinewidth=0.9, zorder=2, **style)  # fmt: skip
        if not alone:
            ax.plot([y.mean()], [row], markersize=5, zorder=3, **style)
    ax.set_yticks(range(len(members)), [label_of(m["group"]) for m in members], fontsize=7)
    ax.set_ylim(len(members) - 0.5, -0.5)
