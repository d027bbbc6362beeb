"""How every figure looks: one colour a token kind and order (safe for colour-blind readers), honest log ticks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.document import write
from analysis.names import name_of

# Okabe and Ito 2008, "Color universal design": told apart under every common colour deficiency and in grey by marker
ARM_COLOURS = {
    "continuous-random": "#0072B2", "continuous-raster": "#009E73",
    "discrete-random": "#D55E00", "discrete-raster": "#CC79A7",
}  # fmt: skip
OTHER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"random": "o", "raster": "s"}
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7eb"
# one column of a two-column paper is 3.3 in; panels are drawn at that width so that text stays readable there
PANEL_WIDTH, PANEL_HEIGHT = 3.5, 2.75
PNG_DPI = 200

plt.rcParams.update({
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.labelcolor": INK, "text.color": INK, "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.7, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "legend.frameon": True,
    "legend.framealpha": 0.85, "legend.edgecolor": "none",
    "legend.fontsize": 7.5, "svg.fonttype": "path", "svg.hashsalt": "fluidscale", "axes.axisbelow": True,
})  # fmt: skip


def colour(group: dict[str, str], order: Sequence[str] = ()) -> str:
    """The arm's own colour, or one by position among `order` for groups of other tables."""
    name = name_of(group)
    if name in ARM_COLOURS:
        return ARM_COLOURS[name]
    return OTHER_COLOURS[list(order).index(name) % len(OTHER_COLOURS)] if name in order else OTHER_COLOURS[0]


def own_colour(group: dict[str, str]) -> str:
    """The arm's colour whatever its settings, which stand beside it as text."""
    return ARM_COLOURS.get("-".join(group[key] for key in ("token_kind", "order") if key in group), OTHER_COLOURS[0])


def marker(group: dict[str, str]) -> str:
    return MARKERS.get(group.get("order", ""), "o")


def grid(
    count: int, columns: int = 2, width: float = PANEL_WIDTH, height: float = PANEL_HEIGHT, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` equal panels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharey=sharey)
    flat = list(axes.ravel())
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def short(value: float, _: Any = None) -> str:
    """1.2M, 48K, 0.35: an axis label that a person reads."""
    if value == 0:
        return "0"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def scientific(value: float, _: Any = None) -> str:
    """3 x 10^13, for compute, which has no household units."""
    power = int(np.floor(np.log10(abs(value)) + 1e-9)) if value else 0
    mantissa = value / 10**power
    return f"$10^{{{power}}}$" if abs(mantissa - 1) < 1e-6 else f"${mantissa:.3g}\\!\\times\\!10^{{{power}}}$"


def log_axis(axis: Any, low: float, high: float, compute: bool = False) -> None:
    """A logarithmic axis with labelled ticks however short its range: linear steps, 1-2-5, 1-3 or whole decades."""
    span = np.log10(high / low)
    # a power of ten with its mantissa is too wide to stand between decades
    subs = (1.0,) if span > (1.0 if compute else 3.0) else (1.0, 3.0) if span > 1.6 else (1.0, 2.0, 5.0)
    axis.set_major_locator(MaxNLocator(5) if span < 0.7 else LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(scientific if compute else short))
    axis.set_minor_formatter(NullFormatter())


def shade(rank: int, count: int) -> float:
    """How dark the line of the size of this rank, 1 the smallest, is among `count` of them."""
    return 0.3 + 0.7 * rank / count


def dress_small(ax: Axes, title: str, xlabel: str, log_y: bool = True) -> None:
    """A narrow panel of lines, one a size, that are drawn: log axes, small letters, a legend."""
    ax.set_xscale("log")
    log_axis(ax.xaxis, *ax.get_xlim())
    if log_y:
        ax.set_yscale("log")
        log_axis(ax.yaxis, *ax.get_ylim())
    ax.tick_params(labelsize=6.5)
    ax.set_title(title, fontsize=8)
    ax.set_xlabel(xlabel, fontsize=7)
    ax.legend(fontsize=6, loc="best")


def save(figure: Figure, folder: Path, name: str) -> bytes:
    """Writes name.png and name.svg under folder; returns the PNG's bytes."""
    # one layout serves both formats, and costs more than drawing either
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    # each canvas prints as the figure stands: savefig would draw it once more to no end
    figure.dpi = PNG_DPI
    figure.patch.set_facecolor("white")
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    write(folder / f"{name}.png", png.getvalue())
    write(folder / f"{name}.svg", svg.getvalue())
    plt.close(figure)
    return png.getvalue()
