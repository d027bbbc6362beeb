"""What a command shows while it works, on stderr, beside --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fluidscale.evaluate.protocol import Progress

EVERY_SECONDS = 10.0


@contextmanager
def shown() -> Iterator[Progress]:
    """Progress with the time left: a bar on a terminal, elsewhere a line every ten seconds and when a phase ends."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def show(phase: str, done: int, total: int) -> None:
            # A bar a phase: the time left is that of the phase's own speed.
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)  # type: ignore[arg-type]

        yield show


def _lines() -> Progress:
    started: dict[str, tuple[float, int]] = {}
    last = time.monotonic()

    def show(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        since, first = started.setdefault(phase, (now, done))
        if done == total:
            print(f"{phase}: {done}", file=sys.stderr, flush=True)
        elif now - last >= EVERY_SECONDS and done > first:
            last, left = now, (total - done) * (now - since) / (done - first)
            print(f"{phase}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)

    return show
