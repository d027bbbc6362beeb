"""Results of the latest computations, for those who ask the same again within one process."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """The `most` latest results, each under a name that says everything which decides it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._results: dict[Hashable, T] = {}

    def __call__(self, name: Hashable, compute: Callable[[], T]) -> T:
        """What was computed under this name, now or before."""
        if name not in self._results:
            result = compute()
            while len(self._results) >= self._most:
                del self._results[next(iter(self._results))]
            self._results[name] = result
        return self._results[name]
