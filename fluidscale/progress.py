"""Long work shown with the time that is left: a bar on a terminal, a line every ten seconds elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY_SECONDS = 10.0


@contextmanager
def counted(name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A function that is told how much more is done; `total` None is work of unknown length."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    started = last = time.monotonic()
    done = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name, total=total)

        def advance(count: int) -> None:
            nonlocal last, done
            done += count
            bar.advance(task, count)
            now = time.monotonic()
            if bar.disable and done and now - last > _EVERY_SECONDS:
                last, rate = now, done / (now - started)
                left = f" of {total}, {(total - done) / rate:.0f} s left" if total else ""
                print(f"{name}: {done}{left}, {rate:.1f} {unit}/s", file=sys.stderr, flush=True)

        yield advance
