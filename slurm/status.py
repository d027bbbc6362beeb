"""The truth about a sweep, read from the run folders alone and reconciled with who still lives.

A status file says what a run last did; only its trunk's claim says whether somebody still does it. A run that says
`running` while nobody holds its trunk is shown as lost: its process died without a word, and the next start resumes it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fluidscale import flops
from fluidscale.folder import RunFolder
from fluidscale.record import read_json
from slurm import claim, layout
from slurm.plan import Plan, PlannedRun, count, duration

# A heartbeat from another machine older than this is a death: several times the longest silence of a healthy run.
SILENCE_SECONDS = 900.0
FINISHED = ("done", "diverged")
OVER = (*FINISHED, "failed")


@dataclass(frozen=True)
class RunState:
    """Where one run stands."""

    planned: PlannedRun
    state: str  # planned | queued | running | lost | stopped | diverged | failed | done
    step: int
    phase: str
    images_per_s: float | None
    seconds_used: float | None
    error: str | None
    scores: dict[str, tuple[float, float | None]]  # metric: value, standard error

    @property
    def share(self) -> float:
        """The part of this run's planned cost that is spent, 0 to 1."""
        if self.state in OVER:
            return 1.0
        cost, train = self.planned.cost, self.planned.spec.train
        trained = self.step / train.steps * cost.train_seconds
        return trained / max(cost.seconds, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        """Time to the end of a running run: its own pace for the steps left, the plan's for the rest."""
        if self.state != "running":
            return None
        cost, train = self.planned.cost, self.planned.spec.train
        if not self.images_per_s:
            return cost.seconds * (1 - self.share)
        return (train.steps - self.step) * train.batch / self.images_per_s + cost.evaluate_seconds


def read_states(plan: Plan, runs_dir: Path) -> list[RunState]:
    """The state of every run of the plan, in the plan's order."""
    held = {
        trunk_id: claim.is_held(layout.trunk_claim(runs_dir, trunk_id))
        for trunk_id in {run.spec.trunk_id for run in plan.runs}
    }
    return [_read(run, runs_dir / run.spec.id, held[run.spec.trunk_id]) for run in plan.runs]


def _read(run: PlannedRun, run_dir: Path, trunk_held: bool) -> RunState:
    folder = RunFolder(run_dir)
    record, status = folder.record, folder.status
    state = record["status"] if record else status.get("state", "queued" if run_dir.exists() else "planned")
    if record is None and state in FINISHED:
        # Only a record says that a run is finished; without it the run is computed again from what is there.
        state = "queued"
    if state == "running" and not _alive(status, trunk_held):
        state = "lost"
    trained = state == "done" or folder.weights.exists()
    if record:
        used = record["gpu_hours"] * 3600
    else:
        cost = read_json(folder.checkpoints / "cost.json")
        used = cost["seconds"] if cost else None
    return RunState(
        planned=run,
        state=state,
        step=run.spec.train.steps if trained else int(status.get("step", 0)),
        phase=str(status.get("phase", "")),
        images_per_s=status.get("images_per_s"),
        seconds_used=used,
        error=status.get("error"),
        scores=_scores(run_dir),
    )


def _alive(status: dict[str, Any], trunk_held: bool) -> bool:
    if status.get("host") != socket.gethostname():
        # Locks of another machine are not always visible here (NFS): its heartbeat is.
        return trunk_held or time.time() - status.get("heartbeat", 0) < SILENCE_SECONDS
    return trunk_held or (_process_lives(status.get("pid", 0)) and time.time() - status["heartbeat"] < SILENCE_SECONDS)


def _process_lives(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not. For runs started by hand, which hold no claim."""
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _scores(run_dir: Path) -> dict[str, tuple[float, float | None]]:
    scores = {}
    for path in (run_dir / "eval").glob("*.json"):
        score = read_json(path)
        if score is not None:
            scores[score["metric"]] = (score["value"], score["se"])
    return scores


def speed(state: RunState) -> tuple[float | None, float | None]:
    """(tokens per second, MFU) of a run in training, from its last line."""
    if state.images_per_s is None:
        return None, None
    spec, placement = state.planned.spec, state.planned.placement
    per_image = 3 * flops.flops_per_image(spec.model)["total"]
    mfu = state.images_per_s * per_image / placement.peak_flops if placement.peak_flops else None
    return state.images_per_s * spec.model.num_tokens, mfu


def as_rows(states: list[RunState], plan_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan's rows with what became of them, as `status --json` prints them."""
    rows = []
    for state, planned in zip(states, plan_rows, strict=True):
        tokens_per_s, mfu = speed(state)
        live = {
            "state": state.state,
            "step": state.step,
            "progress": state.step / state.planned.spec.train.steps,
            "phase": state.phase,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "eta_seconds": state.eta_seconds,
            "gpu_hours_used": None if state.seconds_used is None else state.seconds_used / 3600,
            "error": state.error,
        }
        scores = {name: value for name, (value, _) in state.scores.items()}
        scores |= {f"{name}_se": error for name, (_, error) in state.scores.items()}
        rows.append({**planned, **live, **scores})
    return rows


_COLORS = {"done": "green", "running": "cyan", "stopped": "yellow", "diverged": "magenta"}
_COLORS |= {"failed": "red", "lost": "red"}


def as_table(states: list[RunState], title: str) -> Table:
    """The states for people: what it is, how far it is, how fast, what it scored, what went wrong."""
    table = Table(title=f"{title}: {tally(states)}", title_justify="left")
    table.add_column("run", no_wrap=True)
    for name in ("N", "D", "FLOPs", "state", "step", "tok/s", "MFU", "ETA", "used/plan", "val loss", "GenEval", "FD"):
        table.add_column(name, justify="right", no_wrap=True)
    if any(state.error for state in states):
        table.add_column("last error")
    for state in states:
        table.add_row(*_cells(state), *([state.error or ""] if len(table.columns) == 14 else []))
    return table


def _cells(state: RunState) -> list[str]:
    spec, cost = state.planned.spec, state.planned.cost
    running = state.state == "running"
    tokens_per_s, mfu = speed(state) if running else (None, None)
    used = "-" if state.seconds_used is None else duration(state.seconds_used)
    color = _COLORS.get(state.state)
    label = state.phase if running and state.phase not in ("", "train") else state.state
    return [
        spec.id,
        count(flops.params(spec.model)["total"]),
        count(spec.images),
        f"{flops.train_flops(spec):.1e}",
        f"[{color}]{label}[/]" if color else label,
        f"{100 * state.step / spec.train.steps:.0f}%",
        "" if tokens_per_s is None else count(tokens_per_s),
        "" if mfu is None else f"{100 * mfu:.1f}%",
        "" if state.eta_seconds is None else duration(state.eta_seconds),
        f"{used}/{duration(cost.seconds)}",
        _score(state, "val_loss", 4),
        _score(state, "geneval", 3),
        _score(state, "fd", 2) or _score(state, "fid", 2),
    ]


def _score(state: RunState, metric: str, digits: int) -> str:
    if metric not in state.scores:
        return ""
    value, error = state.scores[metric]
    return f"{value:.{digits}f}" + (f"±{error:.{digits}f}" if error is not None else "")


def tally(states: list[RunState]) -> str:
    """`12 done, 2 running, 6 queued`."""
    order = ("done", "diverged", "failed", "running", "lost", "stopped", "queued", "planned")
    counts = {name: sum(state.state == name for state in states) for name in order}
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


__all__ = ["FINISHED", "OVER", "RunState", "as_rows", "as_table", "read_states", "speed", "tally"]
