"""Run folders to one results table. Nothing is dropped in silence: what is missing is named with its reason."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluidscale.folder import RunFolder
from fluidscale.record import table_csv, table_row, varying, write_atomic
from fluidscale.spec import InvalidInput, RunSpec
from fluidscale.sweep import Sweep
from slurm import drawn, trained, validated
from slurm.status import FINISHED, RunState

# Which drawn set of pictures a report shows, best first: prompts of combinations that training had, then any other.
_SHOWN = ("seen", "")


@dataclass(frozen=True)
class Collected:
    """The table that was written, and the runs that are not in it."""

    table: Path
    rows: int
    missing: tuple[tuple[str, str], ...]  # run id, reason
    vanished: tuple[str, ...]  # run ids of the table that was there before


def collect(sweep: Sweep, states: Iterable[RunState], runs_dir: Path, results: Path) -> Collected:
    """Writes runs.csv, per_prompt, per_image and per_step.parquet, sweep.yaml and samples/ into results/<sweep>.

    A filtered sweep goes to its partial/. Raises InvalidInput when no run is finished.
    """
    states = list(states)
    out = results / sweep.name / "partial" if sweep.partial else results / sweep.name
    finished = [state.planned.spec for state in states if state.state in FINISHED]
    if not finished:
        raise InvalidInput(f"{runs_dir}: no finished run of {sweep.name} yet; start it: make sweep SWEEP={sweep.name}")
    varied = varying(sweep.runs)
    found = {spec.id: drawn.answers(runs_dir / spec.id, _record(spec, runs_dir)) for spec in finished}
    rows = [
        {
            **_row(spec, sweep.name, runs_dir, varied[spec.id]),
            **drawn.protocols_any_n(spec, runs_dir / spec.id, found[spec.id]),
        }
        for spec in finished
    ]
    table = out / "runs.csv"
    before = _run_ids(table)
    write_atomic(table, table_csv(rows))
    drawn.write_per_prompt(out / "per_prompt.parquet", found)
    losses = ((spec.id, validated.per_image(runs_dir / spec.id, _record(spec, runs_dir))) for spec in finished)
    validated.write_per_image(out / "per_image.parquet", losses)
    curves = ((spec.id, trained.curve(runs_dir / spec.id)) for spec in finished)
    trained.write_per_step(out / "per_step.parquet", curves)
    write_atomic(out / "sweep.yaml", sweep.text)
    shown = _shown(finished)
    _copy_samples(shown, runs_dir, out / "samples")
    asked = {name: found[spec.id]["geneval"] for name, spec in shown.items() if "geneval" in found[spec.id]}
    drawn.write_one_prompt(out / "samples" / "prompt", asked)
    ids = {spec.id for spec in finished}
    return Collected(
        table=table,
        rows=len(rows),
        missing=tuple(
            (state.planned.spec.id, state.state + (f": {state.error}" if state.error else ""))
            for state in states
            if state.state not in FINISHED
        ),
        vanished=tuple(run_id for run_id in before if run_id not in ids),
    )


def _record(spec: RunSpec, runs_dir: Path) -> dict[str, Any]:
    record = RunFolder(runs_dir / spec.id).record
    assert record is not None
    return record


def _row(spec: RunSpec, sweep: str, runs_dir: Path, varied: dict[str, Any]) -> dict[str, Any]:
    return table_row(_record(spec, runs_dir), sweep, varied)


def _run_ids(table: Path) -> list[str]:
    if not table.exists():
        return []
    try:
        return [row["run_id"] for row in csv.DictReader(io.StringIO(table.read_text()))]
    except (KeyError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{table}: not a results table of ours (no column run_id); move it away") from error


def _shown(specs: list[RunSpec]) -> dict[str, RunSpec]:
    """<arm>-<size> -> the run that stands for it: of its largest data size and first seed."""
    shown: dict[str, RunSpec] = {}
    for spec in sorted(specs, key=lambda spec: (-spec.images, spec.seed)):
        shown.setdefault(f"{spec.arm}-{spec.size}", spec)
    return shown


def _copy_samples(shown: dict[str, RunSpec], runs_dir: Path, out: Path) -> None:
    """One contact sheet an arm and size."""
    for name, spec in shown.items():
        grid = _grid(runs_dir / spec.id / "samples")
        if grid is not None:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(grid, out / f"{name}.png")


def _grid(samples: Path) -> Path | None:
    grids = sorted(samples.glob("*/grid.png"))
    for prefix in _SHOWN:
        for grid in grids:
            if grid.parent.name.startswith(prefix):
                return grid
    return None
