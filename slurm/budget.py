"""A sweep's hours: asked about before they are passed, and kept to while it works, retries and lost steps included."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fluidscale.spec import InvalidInput
from slurm import attempts
from slurm.plan import Plan, as_rows
from slurm.status import OVER, RunState

# Asking reads two small files a run.
_LOOK_SECONDS = 60.0


class UsedUp(RuntimeError):
    """A sweep's hours are used up and some of its runs are not over."""


class Budget:
    """The device-hours that some runs together may use, as a worker sees them."""

    def __init__(self, run_dirs: Sequence[Path], hours: float) -> None:
        self._run_dirs, self._hours = run_dirs, hours
        self._spent, self._looked = 0.0, -math.inf

    def exceeded(self, age: float = math.inf) -> bool:
        """Whether they are used up, as of a minute (or `age` seconds) ago at most; never without a bound (0)."""
        if self._hours and time.monotonic() - self._looked > min(age, _LOOK_SECONDS):
            self._spent, self._looked = attempts.hours_spent(self._run_dirs), time.monotonic()
        return self._hours > 0 and self._spent >= self._hours

    @property
    def reason(self) -> str:
        return f"the sweep has used {self._spent:.3g} of its {self._hours:g} GPU-hours; allow more: --max-gpu-hours"


def agreed(
    plan: Plan,
    states: Sequence[RunState],
    hours: float,
    ask: Callable[[str], bool] | None = None,
    elsewhere: float = 0.0,
) -> float:
    """The bound to launch with: `hours`, or 0 (none) when they would not do and somebody said to go on all the same.

    `elsewhere` is what runs of the sweep that the plan leaves out have used. Raises InvalidInput where the hours would
    not do and nobody can be asked, or the answer is no.
    """
    spent = elsewhere + sum(state.device_seconds_used or 0.0 for state in states) / 3600
    prices = {row["run_id"]: row["gpu_hours"] for row in as_rows(plan)}
    missing = sum(prices[s.planned.spec.id] * (1 - s.share) for s in states if s.state not in OVER)
    if not hours or spent + missing <= hours:
        return hours
    wanted = f"{spent:.3g} GPU-hours are spent and the rest needs about {missing:.3g}, --max-gpu-hours is {hours:g}"
    if (ask or _ask)(f"{wanted}. Go on without a bound? [y/N] "):
        return 0.0
    raise InvalidInput(f"{wanted}; take fewer sizes or arms, or allow more: --max-gpu-hours {spent + missing:.3g}")


def _ask(question: str) -> bool:
    """A yes of somebody who sits there; a script says no."""
    return sys.stdin.isatty() and input(question).strip().lower() in ("y", "yes")
