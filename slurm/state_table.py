"""A sweep's state as people read it: a table as wide and high as their terminal, or plain lines for a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from fluidscale import flops
from slurm import attempts
from slurm.plan import count, duration
from slurm.status import RunState, speed, tally

_COLORS = {"done": "green", "running": "cyan", "trained": "cyan", "stopped": "yellow", "diverged": "magenta"}
_COLORS |= {"failed": "red", "lost": "red"}
# The columns that every run fills; text stands left, numbers right.
_COLUMNS: tuple[str, ...] = ("run", "N", "D", "FLOPs", "state", "seen", "step", "tok/s", "MFU", "ETA",
                             "used/plan", "val loss", "GenEval", "FD")  # fmt: skip
# What a narrow terminal does without, in this order.
_SPARED = ("MFU", "tok/s", "FLOPs", "seen", "N", "FD", "used/plan", "D", "ETA")
_TEXT_WIDTH = 20  # that a column of words may be broken down to
# What a low terminal shows first: who needs somebody, then who moves.
_FIRST = ("failed", "lost", "running", "diverged", "stopped", "trained", "queued", "planned", "done")
_FRAME_LINES = 7  # title, borders, heads and what stands below a table


def as_table(states: list[RunState], title: str, width: int = 240, height: int | None = None) -> Table:
    """What each run is, how far it is, how fast, what it scored, what went wrong.

    Of more runs than `height` has lines for, those that matter now; of the columns, those that `width` has room for.
    """
    shown = _most_wanted(states, height)
    more = _more(shown)
    rows = [dict(zip(_COLUMNS, _cells(state), strict=True)) for state in shown]
    names = _fitting(rows, width - (_TEXT_WIDTH + 3) * len(more))
    left_out = f" (of {len(states)} runs {len(shown)} shown)" if len(shown) < len(states) else ""
    table = Table(title=f"{title}: {tally(states)}{left_out}", title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for name, _ in more:
        table.add_column(name, min_width=_TEXT_WIDTH)
    for state, row in zip(shown, rows, strict=True):
        cells = {name: escape(row[name]) for name in names}
        if color := _COLORS.get(state.state):
            cells["state"] = f"[{color}]{cells['state']}[/]"
        table.add_row(*cells.values(), *(escape(cell(state)) for _, cell in more))
    return table


def _most_wanted(states: list[RunState], height: int | None) -> list[RunState]:
    """As many as fit, in their order."""
    if height is None or len(states) <= (room := max(height - _FRAME_LINES, 1)):
        return states
    wanted = sorted(range(len(states)), key=lambda i: _FIRST.index(states[i].state))[:room]
    return [states[i] for i in sorted(wanted)]


def _fitting(rows: list[dict[str, str]], width: int) -> list[str]:
    """The columns that have room beside each other."""
    needs = {name: 3 + max(len(name), *(cell_len(row[name]) for row in rows)) for name in _COLUMNS}
    names = list(_COLUMNS)
    for name in _SPARED:
        if 1 + sum(needs[name] for name in names) <= width:
            break
        names.remove(name)
    return names


def as_text(states: list[RunState], title: str) -> str:
    """The same as aligned lines, for files and pipes: to draw a table of a thousand runs takes longer than the rest."""
    more = _more(states)
    rows = [[*_COLUMNS, *(name for name, _ in more)]]
    rows += [[*_cells(state), *(cell(state) for _, cell in more)] for state in states]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, *range(len(_COLUMNS), len(rows[0]))}
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([f"{title}: {tally(states)}", *(line.rstrip() for line in lines)])


def _more(states: list[RunState]) -> list[tuple[str, Callable[[RunState], str]]]:
    """Columns that only some sweeps need."""
    more: list[tuple[str, Callable[[RunState], str]]] = []
    if any(attempts.retries(state.attempts) for state in states):
        more.append(("retries", _retries))
    if any(state.error for state in states):
        more.append(("last error", lambda state: state.error or ""))
    return more


def _retries(state: RunState) -> str:
    return ", ".join(f"{times} {cause}" for cause, times in attempts.retries(state.attempts).items())


def _cells(state: RunState) -> list[str]:
    spec, cost = state.planned.spec, state.planned.cost
    running = state.state == "running"
    tokens_per_s, mfu = speed(state) if running else (None, None)
    used = "-" if state.device_seconds_used is None else duration(state.device_seconds_used)
    label = state.phase if running and state.phase not in ("", "train") else state.state
    return [
        spec.id,
        count(flops.params(spec.model)["total"]),
        count(spec.images),
        f"{flops.train_flops(spec):.1e}",
        label,
        duration(max(0.0, time.time() - state.heartbeat)) if running and state.heartbeat else "",
        f"{100 * state.step / spec.train.steps:.0f}%",
        "" if tokens_per_s is None else count(tokens_per_s),
        "" if mfu is None else f"{100 * mfu:.1f}%",
        "" if state.eta_seconds is None else duration(state.eta_seconds),
        f"{used}/{duration(cost.device_seconds)}",
        _score(state, "val_loss", 4),
        _score(state, "geneval", 3),
        _score(state, "fd", 2) or _score(state, "fid", 2),
    ]


def _score(state: RunState, metric: str, digits: int) -> str:
    if metric not in state.scores:
        return ""
    value, error = state.scores[metric]
    return f"{value:.{digits}f}" + (f"±{error:.{digits}f}" if error is not None else "")
