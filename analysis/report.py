"""The report: one offline HTML file, its figures as PNG and SVG, and a Markdown version, all from laws.json alone.

python analysis/report.py results/local/laws.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import jinja2  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from analysis import beside, diagnostics, figures, listings, names, panels, pictures, tuned, words  # noqa: E402
from analysis.document import write  # noqa: E402

Document = dict[str, Any]
LISTINGS = (
    listings.glance, tuned.best_values, listings.laws, listings.remarks, listings.choice, listings.rollouts,
    listings.calibration, listings.predictions, listings.crossings, listings.chances, listings.matches,
    listings.contrasts, listings.compositions, listings.links, listings.ceilings, listings.allocations,
    listings.isoflops, listings.sensitivities, listings.noise, listings.runs, listings.excluded,
)  # fmt: skip
TEMPLATES = Path(__file__).parent / "templates"
# a report has some twenty figures: more processes would only be started
DRAWING_PROCESSES = 8


@dataclass(frozen=True)
class Job:
    """A figure to be drawn, if the data allow it: where it stands, its file's name, its caption, who draws it."""

    section: str
    name: str
    caption: str
    draw: Callable[[], Figure | None]

    def drawn(self, folder: Path) -> dict[str, Any] | None:
        """Saves the figure under `folder`; as the page wants it: the image embedded, `half` where one panel wide."""
        figure = self.draw()
        if figure is None:
            return None
        half = figure.get_figwidth() < 5
        image = panels.save(figure, folder, self.name)
        shown = {"section": self.section, "name": self.name, "caption": self.caption, "half": half}
        return shown | {"src": pictures.embedded(image)}


def _ladders(doc: Document) -> Iterator[Job]:
    """The metrics along sizes and images, and along what was varied at every size."""
    for metric in figures.headline_metrics(doc):
        title = words.capital(names.title_of(metric))
        caption = f"{title} against what was varied, a line a model size; dotted: the best value."
        yield Job(metric, f"{metric}-tuned", caption, partial(tuned.along_setting, doc, metric))
        data_ladder = figures.is_data_ladder(doc, metric)
        for axis in ("d",) if data_ladder else ("n", "c"):
            caption = f"{title} against {figures.axis_name(doc, axis)}."
            yield Job(metric, f"{metric}-vs-{axis}", caption, partial(figures.metric_along, doc, metric, axis))
        if not data_ladder:
            caption = f"{title} against {figures.axis_name(doc, 'd')}, a line a model size."
            yield Job(metric, f"{metric}-vs-d", caption, partial(figures.along_data, doc, metric))
    yield Job("tags", "score-tags", "Each tag of the score against parameters.", partial(figures.tags, doc))


def _settings(doc: Document) -> Iterator[Job]:
    """The metrics of groups of one size, side by side."""
    for metric in figures.headline_metrics(doc):
        caption = f"{words.capital(names.title_of(metric))}: means, and pale the runs they are of."
        yield Job(metric, f"{metric}-side-by-side", caption, partial(beside.side_by_side, doc, metric))
    yield Job("tags", "score-tags", "Each tag of the score.", partial(beside.tags, doc))


def _jobs(doc: Document) -> Iterator[Job]:
    """Every figure that a report may have, in its order."""
    yield from _settings(doc) if beside.is_flat(doc) else _ladders(doc)
    caption = "Metric against validation loss, one line an arm."
    yield Job("links", "loss-to-metric", caption, partial(diagnostics.links, doc))
    caption = (
        "Best model size and data size for a budget; shaded: beyond what was trained; dotted: interval off the panel."
    )
    yield Job("allocation", "allocation", caption, partial(diagnostics.allocation, doc))
    yield Job("isoflop", "isoflop", "Profiles at equal compute, a cross-check.", partial(diagnostics.isoflop, doc))
    caption = "What the laws leave unexplained, in percent of the measured loss."
    yield Job("residuals", "residuals", caption, partial(diagnostics.residuals, doc))
    caption = "Training loss, a line a model size."
    yield Job("curves", "learning-curves", caption, partial(diagnostics.learning_curves, doc))
    caption = "Predictions made from smaller rungs alone."
    yield Job("predictions", "calibration", caption, partial(diagnostics.calibration, doc))


def _figures(doc: Document, folder: Path) -> list[dict[str, Any]]:
    """Draws and saves the figures, on all cores; those of an earlier report that this one does not have are removed."""
    place = folder / "figures"
    with ProcessPoolExecutor(min(os.cpu_count() or 1, DRAWING_PROCESSES)) as pool:
        out = [shown for shown in pool.map(Job.drawn, _jobs(doc), repeat(place)) if shown is not None]
    names = {f["name"] for f in out}
    for old in place.glob("*.*"):
        if old.suffix in (".png", ".svg") and old.stem not in names:
            old.unlink()
    return out


def _context(doc: Document, folder: Path, samples: Path) -> dict[str, Any]:
    listed = {listing.__name__: listing(doc) for listing in LISTINGS}
    return {
        "doc": doc, "figures": _figures(doc, folder), "samples": pictures.samples(doc, samples), "listed": listed,
        "summary": words.summary(doc), "verdicts": listings.verdicts(doc),
        "metrics": figures.headline_metrics(doc), "flat": beside.is_flat(doc),
    }  # fmt: skip


def build(laws: Path, samples: Path | None = None) -> Path:
    """laws.json -> report/index.html, report/report.md and report/figures/ beside it; returns the HTML file."""
    doc = json.loads(laws.read_text())
    folder = laws.parent / "report"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(title_of=names.title_of, capital=words.capital)
    context = _context(doc, folder, samples or laws.parent / "samples")
    write(folder / "report.md", environment.get_template("report.md.j2").render(context))
    write(folder / "index.html", environment.get_template("report.html.j2").render(context))
    return folder / "index.html"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Writes the report of a laws.json (fit_laws.py does so too).")
    p.add_argument("laws", nargs="?", type=Path, default=ROOT / "results/local/laws.json")
    p.add_argument("--samples", type=Path, help="folder of <arm>-<size>.png grids (samples/ beside laws.json)")
    args = p.parse_args(argv)
    try:
        print(build(args.laws, args.samples))
    except (OSError, ValueError) as error:
        print(f"report: {args.laws}: {error}: run fit_laws.py first", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
