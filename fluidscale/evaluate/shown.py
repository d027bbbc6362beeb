"""What a command shows while it works, on stderr, beside --json."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fluidscale.evaluate.protocol import Progress


@contextmanager
def shown() -> Iterator[Progress]:
    """Progress with the time left on a terminal; elsewhere a line whenever a phase ends."""
    if not sys.stderr.isatty():
        yield lambda phase, done, total: print(f"{phase}: {done}", file=sys.stderr) if done == total else None
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
