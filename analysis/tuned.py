"""What the report shows of a setting that was varied at every size: the metric along it, the best value, its course."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.figures import arms
from analysis.listings import Listing
from analysis.names import heading_of, label_of, title_of
from analysis.panels import colour, dress_small, grid, shade, short
from analysis.table import is_part
from analysis.words import digits, span

Document = dict[str, Any]


def _of(doc: Document, metric: str) -> list[Document]:
    return [o for o in doc.get("optima", []) if o["metric"] == metric]


def along_setting(doc: Document, metric: str) -> Figure | None:
    """The metric along the setting, a line a size, darker for larger; dotted where a parabola has it best."""
    found = _of(doc, metric)
    if not found:
        return None
    figure, axes = grid(len(found), columns=4, width=2.4, height=2.6)
    for ax, o in zip(axes, found, strict=True):
        tint = colour(o["group"], arms(doc))
        for rank, s in enumerate(o["sizes"], 1):
            style = {"color": tint, "alpha": shade(rank, len(o["sizes"]))}
            y, bars = np.array(s["y"]), 1.96 * np.array(s["error"])
            ax.errorbar(s["values"], y, bars, linewidth=1.1, marker="o", markersize=3,
                        label=s["size"] or short(s["n"]), **style)  # fmt: skip
            if not s["at_end"]:
                ax.axvline(s["best"], linewidth=0.8, linestyle=":", **style)
        dress_small(ax, heading_of(o["group"]), o["setting"], log_y=o["kind"] != "score")
    axes[0].set_ylabel(title_of(metric), fontsize=7.5)
    return figure


def best_values(doc: Document) -> Listing:
    """One row a group and size: what was tried, where it is best, and how the best value moves with size."""
    rows = []
    for o in (o for o in doc.get("optima", []) if not is_part(o["metric"])):
        for s in o["sizes"]:
            tried, last = ", ".join(f"{v:.4g}" for v in s["values"]), s is o["sizes"][-1]
            ends = [digits(end, 3) if end else word for end, word in zip(s["interval"], ("first", "last"), strict=True)]
            place = f"{digits(s['best'], 3)} [{', '.join(ends)}]"
            moves = f"{o['along']}^{digits(o['moves'][0], 3)} {span(o['moves'][1:])}" if last and o["moves"] else ""
            rows.append((title_of(o["metric"]), label_of(o["group"]), s["size"] or short(s["n"]), o["setting"], tried,
                         place, moves))  # fmt: skip
    note = (
        "A parabola through the best value and its neighbours, in the logs (scores as they are); first and last: at or "
        "beyond what was tried. Intervals hold the evaluation's errors, and those of seeds where runs were repeated. "
        "How it moves: the exponent along the sizes whose best value lies between others."
    )
    return Listing("The best value of what was varied", note,
                   ("metric", "arm", "size", "setting", "tried", "best", "moves as"), rows)  # fmt: skip
