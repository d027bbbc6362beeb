"""The truth about a sweep, read from the run folders alone and reconciled with who still lives.

A status file says what a run last did; only its trunk's claim says whether somebody still does it. A run that says
`running` while nobody holds its trunk is shown as lost: its process died without a word, and the next start resumes it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluidscale import flops
from fluidscale.folder import RunFolder
from fluidscale.processes import lives
from fluidscale.record import read_json, write_json
from slurm import attempts, claim, layout
from slurm.attempts import Attempt
from slurm.plan import Plan, PlannedRun

# A heartbeat from another machine older than this is a death: several times the longest silence of a healthy run.
SILENCE_SECONDS = 900.0
FINISHED = ("done", "diverged")
OVER = (*FINISHED, "failed")


@dataclass(frozen=True)
class RunState:
    """Where one run stands."""

    planned: PlannedRun
    state: str  # planned | queued | running | trained | lost | stopped | diverged | failed | done
    step: int
    phase: str
    images_per_s: float | None
    device_seconds_used: float | None  # of all its devices together, as the plan's
    heartbeat: float | None  # seconds since the epoch
    attempts: tuple[Attempt, ...]
    error: str | None
    scores: dict[str, tuple[float, float | None]]  # metric: value, standard error

    @property
    def job(self) -> str:
        """SLURM's id of the task that works on it, or last did; empty outside of SLURM."""
        return self.attempts[-1].job if self.attempts else ""

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


def read_states(plan: Plan, runs_dir: Path, before: Sequence[RunState] = ()) -> list[RunState]:
    """The state of every run of the plan, in the plan's order.

    `before` is what an earlier look of the same process gave: what was finished then is not read again.
    """
    known = {state.planned.spec.id: state for state in before if state.state in FINISHED}
    open_runs = [run for run in plan.runs if run.spec.id not in known]
    held = {trunk_id: _held(runs_dir, trunk_id) for trunk_id in {run.spec.trunk_id for run in open_runs}}
    read = {run.spec.id: _read(run, runs_dir / run.spec.id, held[run.spec.trunk_id]) for run in open_runs}
    return [known.get(run.spec.id) or read[run.spec.id] for run in plan.runs]


def read_state(run: PlannedRun, runs_dir: Path) -> RunState:
    """The state of one run as it is now."""
    return _read(run, runs_dir / run.spec.id, _held(runs_dir, run.spec.trunk_id))


def write_back(states: list[RunState], runs_dir: Path) -> None:
    """Writes into their folders which runs nobody works on any more: the tracker's mirror closes what is closed there.

    Only where nobody has begun again meanwhile, and where this user may.
    """
    for state in states:
        if state.state in ("lost", "stopped"):
            with contextlib.suppress(OSError):
                _write_back(state, runs_dir)


def _write_back(state: RunState, runs_dir: Path) -> None:
    folder = RunFolder(runs_dir / state.planned.spec.id)
    before = folder.status
    if (before.get("state"), before.get("error")) == (state.state, state.error):
        return
    held = []
    try:
        held += [claim.take(path, {}) for path in _claims(runs_dir, state.planned.spec.trunk_id)]
        # Nobody can begin while the claims are ours; whoever began before them has left a sign of life.
        if all(held) and folder.status == before and before.get("heartbeat") == state.heartbeat and not folder.record:
            attempts.bury(folder, "stopped" if state.state == "stopped" else attempts.NODE_FAILURE)
            write_json(folder.path / "status.json", {**before, "state": state.state, "error": state.error})
    finally:
        for each in held:
            if each is not None:
                each.release()


def _claims(runs_dir: Path, trunk_id: str) -> list[Path]:
    return [layout.trunk_claim(runs_dir, trunk_id, stage) for stage in ("whole", "evaluate")]


def _held(runs_dir: Path, trunk_id: str) -> bool:
    return any(claim.is_held(path) for path in _claims(runs_dir, trunk_id))


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
    lives = tuple(attempts.read(folder))
    return RunState(
        planned=run,
        state=state,
        step=run.spec.train.steps if trained else int(status.get("step", 0)),
        phase=str(status.get("phase", "")),
        images_per_s=status.get("images_per_s"),
        device_seconds_used=_device_seconds_used(run, folder, record, status, lives),
        heartbeat=status.get("heartbeat"),
        attempts=lives,
        error=status.get("error"),
        scores=_scores(run_dir),
    )


def _device_seconds_used(
    run: PlannedRun,
    folder: RunFolder,
    record: dict[str, Any] | None,
    status: dict[str, Any],
    lives: tuple[Attempt, ...],
) -> float | None:
    """Of all attempts, lost steps included; of a run by hand, what its files know."""
    if lives:
        return attempts.seconds(lives, status.get("heartbeat", 0.0))
    if record:
        return record["gpu_hours"] * 3600
    cost = read_json(folder.checkpoints / "cost.json")
    return cost["seconds"] * run.placement.processes if cost else None


def _alive(status: dict[str, Any], trunk_held: bool) -> bool:
    if status.get("host") != socket.gethostname():
        # Locks of another machine are not always visible here (NFS): its heartbeat is.
        return trunk_held or time.time() - status.get("heartbeat", 0) < SILENCE_SECONDS
    # The process is asked for runs started by hand, which hold no claim.
    return trunk_held or (lives(status.get("pid", 0)) and time.time() - status["heartbeat"] < SILENCE_SECONDS)


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
    peak = placement.peak_flops * placement.processes
    mfu = state.images_per_s * per_image / peak if peak else None
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
            "heartbeat_age_seconds": None if state.heartbeat is None else max(0.0, time.time() - state.heartbeat),
            "job": state.job or None,
            "retries": attempts.retries(state.attempts),
            "gpu_hours_used": None if state.device_seconds_used is None else state.device_seconds_used / 3600,
            "error": state.error,
        }
        scores = {name: value for name, (value, _) in state.scores.items()}
        scores |= {f"{name}_se": error for name, (_, error) in state.scores.items()}
        rows.append({**planned, **live, **scores})
    return rows


def tally(states: list[RunState]) -> str:
    """`12 done, 2 running, 6 queued`."""
    order = ("done", "diverged", "failed", "trained", "running", "lost", "stopped", "queued", "planned")
    counts = {name: sum(state.state == name for state in states) for name in order}
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


__all__ = ["FINISHED", "OVER", "RunState", "as_rows", "read_state", "read_states", "speed", "tally", "write_back"]
