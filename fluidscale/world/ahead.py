"""Scenes drawn ahead, by processes of their own, for whoever encodes them or learns from them on a faster device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from fluidscale.machine import available_cores
from fluidscale.spec import WorldSpec
from fluidscale.world.world import World

Item = TypeVar("Item")
Drawn = TypeVar("Drawn")

_WORLDS: list[World] = []


def drawers(world: World, device: str) -> Drawers:
    """As many as may draw while `device` computes: all cores but one beside a GPU, none beside a CPU's one thread."""
    return Drawers(world, 0 if device == "cpu" else available_cores() - 1)


class Drawers:
    """Draws a world's scenes in `workers` processes, a little ahead of the reader; 0: in this one, when asked.

    The processes start at the first use and end with the `with` block. What is drawn is the same for any number.
    """

    def __init__(self, world: World, workers: int) -> None:
        self.world, self.workers = world, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Drawers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, draw: Callable[[World, Item], Drawn], items: Iterable[Item]) -> Iterator[Drawn]:
        """draw(world, item) of each item, in order; `draw` must be a function of a module, or a partial of one."""
        if self.workers < 1:
            yield from (draw(self.world, item) for item in items)
            return
        if self._pool is None:
            # Spawned: this process may hold a GPU, threads and locks, none of which survive a fork.
            self._pool = ProcessPoolExecutor(
                self.workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(self.world.spec,)
            )
        ahead: deque[Future[Drawn]] = deque()
        for item in items:
            ahead.append(self._pool.submit(_drawn, draw, item))
            if len(ahead) > 2 * self.workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _start(spec: WorldSpec) -> None:
    # The parent decides what an interrupt means, and nobody may tell these that it was killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _WORLDS.append(World(spec))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _drawn(draw: Callable[[World, Any], Drawn], item: Any) -> Drawn:
    return draw(_WORLDS[0], item)


__all__ = ["Drawers", "drawers"]
