"""The report: one offline HTML file, its figures as PNG and SVG, and a Markdown version, all from laws.json alone.

python analysis/report.py results/local/laws.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import jinja2  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from analysis import diagnostics, figures, listings, panels, pictures, words  # noqa: E402
from analysis.document import write  # noqa: E402

Document = dict[str, Any]
LISTINGS = (
    "glance", "laws", "remarks", "choice", "rollouts", "calibration", "predictions", "crossings", "chances",
    "contrasts", "compositions", "links", "ceilings", "allocations", "isoflops", "sensitivities", "noise", "runs",
    "excluded",
)  # fmt: skip
TEMPLATES = Path(__file__).parent / "templates"


def _jobs(doc: Document) -> Iterator[tuple[str, str, str, Figure | None]]:
    """Every figure the data allow: section, file name, caption, figure."""
    metrics = [m for m in dict.fromkeys(m["metric"] for m in doc["measurements"]) if not m.startswith("geneval_")]
    for metric in metrics:
        title = words.title_of(metric)
        for axis in ("n", "c"):
            caption = f"{title[:1].upper()}{title[1:]} against {figures.axis_name(doc, axis)}."
            yield metric, f"{metric}-vs-{axis}", caption, figures.metric_along(doc, metric, axis)
        caption = f"{title[:1].upper()}{title[1:]} against {figures.axis_name(doc, 'd')}, a line a model size."
        yield metric, f"{metric}-vs-d", caption, figures.along_data(doc, metric)
    yield "tags", "score-tags", "Each tag of the score against parameters.", figures.tags(doc)
    yield "links", "loss-to-metric", "Metric against validation loss, one line an arm.", diagnostics.links(doc)
    caption = (
        "Best model size and data size for a budget; shaded: beyond what was trained; dotted: interval off the panel."
    )
    yield "allocation", "allocation", caption, diagnostics.allocation(doc)
    yield "isoflop", "isoflop", "Profiles at equal compute, a cross-check.", diagnostics.isoflop(doc)
    caption = "What the laws leave unexplained, in percent of the measured loss."
    yield "residuals", "residuals", caption, diagnostics.residuals(doc)
    yield "curves", "learning-curves", "Training loss, a line a model size.", diagnostics.learning_curves(doc)
    yield "predictions", "calibration", "Predictions made from smaller rungs alone.", diagnostics.calibration(doc)


def _figures(doc: Document, folder: Path) -> list[dict[str, Any]]:
    """Draws and saves the figures; each with its section, caption and embedded image, `half` where one panel wide.

    Figures of an earlier report that this one does not have are removed.
    """
    out = []
    for section, name, caption, figure in _jobs(doc):
        if figure is not None:
            half = figure.get_figwidth() < 5
            image = panels.save(figure, folder / "figures", name)
            out.append(
                {"section": section, "name": name, "caption": caption, "src": pictures.embedded(image), "half": half}
            )
    names = {f["name"] for f in out}
    for old in (folder / "figures").glob("*.*"):
        if old.suffix in (".png", ".svg") and old.stem not in names:
            old.unlink()
    return out


def _context(doc: Document, folder: Path, samples: Path) -> dict[str, Any]:
    listed = {name: getattr(listings, name)(doc) for name in LISTINGS}
    return {
        "doc": doc, "figures": _figures(doc, folder), "samples": pictures.samples(doc, samples), "listed": listed,
        "summary": words.summary(doc), "verdicts": listings.verdicts(doc),
        "metrics": [m for m in dict.fromkeys(m["metric"] for m in doc["measurements"]) if not m.startswith("geneval_")],
    }  # fmt: skip


def build(laws: Path, samples: Path | None = None) -> Path:
    """laws.json -> report/index.html, report/report.md and report/figures/ beside it; returns the HTML file."""
    doc = json.loads(laws.read_text())
    folder = laws.parent / "report"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(title_of=words.title_of, capital=words.capital)
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
