"""Results of the latest computations, for those who ask the same again within one process."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """The `most` latest results, each under a name that says everything which decides it.

    With `weigh` (bytes of a result, say) as many of the latest as weigh `most` together.
    """

    def __init__(self, most: int, weigh: Callable[[T], int] = lambda _: 1) -> None:
        self._most, self._weigh, self._weight = most, weigh, 0
        self._results: dict[Hashable, T] = {}

    def __call__(self, name: Hashable, compute: Callable[[], T]) -> T:
        """What was computed under this name, now or before."""
        if name in self._results:
            return self._results[name]
        result = compute()
        weight = self._weigh(result)
        if weight <= self._most:
            while self._weight + weight > self._most:
                self._weight -= self._weigh(self._results.pop(next(iter(self._results))))
            self._results[name] = result
            self._weight += weight
        return result
