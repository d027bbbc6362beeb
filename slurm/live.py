"""Progress of a launch: bars on a terminal, plain lines anywhere else. Both say the same and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from slurm.plan import count, duration
from slurm.status import OVER, RunState, tally

_LINE_SECONDS = 30.0
# Before this much of the work is done, the plan says more about the end than the pace so far.
_TRUST_PACE = 0.03


class Pace:
    """Time to the end: the planned cost of what is left, corrected by how fast planned cost was worked off so far."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._started: float | None = None
        self._first = 0.0

    def share_and_eta(self, states: list[RunState]) -> tuple[float, float]:
        """(share of the planned cost that is spent, seconds to the end)."""
        total = sum(state.planned.cost.seconds for state in states)
        done = sum(state.share * state.planned.cost.seconds for state in states)
        if self._started is None or done == self._first:
            # Data is encoded once, before the first step: it says nothing about the pace.
            self._started, self._first = time.monotonic(), done
        elapsed, worked = time.monotonic() - self._started, done - self._first
        if worked > _TRUST_PACE * total and elapsed > 0:
            return done / total, (total - done) * elapsed / worked
        return done / total, (total - done) / self._workers


def describe(state: RunState) -> str:
    """What became of a run, in one line."""
    spec = state.planned.spec
    line = f"{state.state:8s} {spec.id}"
    if state.state in ("failed", "lost") and state.error:
        return f"{line}: {state.error}"
    if state.state in OVER:
        scores = [
            f"{name} {state.scores[name][0]:.4g}" for name in ("val_loss", "geneval", "fd") if name in state.scores
        ]
        several = " of device time" if state.planned.placement.processes > 1 else ""
        used = [] if state.device_seconds_used is None else [f"in {duration(state.device_seconds_used)}{several}"]
        return "  ".join([line, *scores, *used])
    return f"{line}  step {state.step} of {spec.train.steps}" if state.step else line


def _place(state: RunState) -> str:
    spec = state.planned.spec
    where = state.phase if state.phase not in ("", "train") else f"{100 * state.step / spec.train.steps:.0f}%"
    return f"{spec.arm} {spec.size} {count(spec.images)} {where}"


class PlainLines:
    """One line for every change of state, and one on the whole every half minute."""

    def __init__(self, workers: int, write: Callable[[str], None]) -> None:
        self._pace, self._write = Pace(workers), write
        self._known: dict[str, str] = {}
        self._spoken = time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, states: list[RunState]) -> None:
        for state in _changed(states, self._known):
            self._write(describe(state))
        share, eta = self._pace.share_and_eta(states)
        if time.monotonic() - self._spoken > _LINE_SECONDS:
            self._spoken = time.monotonic()
            now = ", ".join(_place(state) for state in states if state.state == "running")
            self._write(f"{100 * share:.0f}%  {tally(states)}; now: {now}; about {duration(eta)} left")


class Bars:
    """A bar for every run in work under one for the sweep; what ends is printed above them."""

    def __init__(self, workers: int, console: Console) -> None:
        self._pace, self._known = Pace(workers), {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            # Every redraw is time that a one-thread run on the same cores does not get.
            refresh_per_second=2,
        )
        self._whole = self._progress.add_task("sweep", total=1.0, note="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, states: list[RunState]) -> None:
        for state in _changed(states, self._known):
            if state.state not in ("running", "queued", "planned"):
                self._progress.console.print(describe(state), highlight=False, markup=False)
        for state in states:
            self._show(state)
        share, eta = self._pace.share_and_eta(states)
        self._progress.update(self._whole, completed=share, note=f"{tally(states)}; about {duration(eta)} left")

    def _show(self, state: RunState) -> None:
        spec = state.planned.spec
        if state.state != "running":
            if spec.id in self._tasks:
                self._progress.remove_task(self._tasks.pop(spec.id))
            return
        if spec.id not in self._tasks:
            self._tasks[spec.id] = self._progress.add_task(spec.id, total=spec.train.steps, note="")
        note = state.phase if state.phase != "train" else f"{state.step}/{spec.train.steps}"
        self._progress.update(self._tasks[spec.id], completed=state.step, note=note)


def _changed(states: list[RunState], known: dict[str, str]) -> list[RunState]:
    """The runs whose state is news; at the first look only those that are in work."""
    first = not known
    news = []
    for state in states:
        run_id = state.planned.spec.id
        if known.get(run_id) != state.state and not (first and state.state != "running"):
            news.append(state)
        known[run_id] = state.state
    return [state for state in news if state.state not in ("planned", "queued")]
