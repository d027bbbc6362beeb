"""What a value may be: its type, its range or its names, and the one line that refuses it.

A field's annotation says it (`batch: AtLeastOne`), and whoever reads a file through `from_dict` is held to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class InvalidInput(ValueError):
    """The user's input cannot be used; the message says what, where and the way out (exit code 2)."""


@dataclass(frozen=True)
class Range:
    """Numbers within all of the bounds that are given."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def refusal(self, value: float) -> str:
        """What is expected instead of `value`; empty when it lies within."""
        if self.least <= value <= self.most and self.above < value < self.below:
            return ""
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return f"expected {' and '.join(f'{word} {n:.12g}' for word, n in bounds if math.isfinite(n))}, got {value!r}"


@dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: tuple[str, ...]

    def refusal(self, value: str) -> str:
        """What is expected instead of `value`; empty when it is one of the names."""
        if value in self.names:
            return ""
        return f"unknown {value!r}; did you mean {nearest(value, self.names)!r}? known: {', '.join(self.names)}"


Count = Annotated[int, Range(least=0)]
AtLeastOne = Annotated[int, Range(least=1)]
Amount = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
# A decay of 1 would never take anything in.
Decay = Annotated[float, Range(least=0, below=1)]

_KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def from_dict(cls: type[T], content: Any, where: str) -> T:
    """Builds a dataclass from plain data; raises InvalidInput, naming `where`, on a key that is unknown or missing and
    on a value that its annotation does not allow."""
    hints, required = _fields(cls)
    values: dict[str, Any] = {}
    for key, value in mapping(content, where).items():
        if key not in hints:
            raise InvalidInput(unknown_key(key, hints, where))
        values[key] = typed(value, hints[key], f"{where}: {key}")
    if missing := [name for name in required if name not in values]:
        raise InvalidInput(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def checked(value: T, where: str) -> T:
    """A dataclass that no file was read for, held to its annotations as `from_dict` holds one that is read."""
    return typed(value, type(value), where)


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as an annotation wants it. Raises InvalidInput where it cannot be had without a guess."""
    wanted = _wanted(hint)
    value = _of_kind(value, wanted, where)
    for limit in wanted.limits:
        if refusal := limit.refusal(value):
            raise InvalidInput(f"{where}: {refusal}")
    return value


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A section of a file: its keys and values, none where it is left empty. Raises InvalidInput on anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise InvalidInput(f"{where}: expected keys and values, got {value!r}")
    return {str(key): item for key, item in (value or {}).items()}


def unknown_key(key: Any, known: Iterable[str], where: str) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    return f"{where}: unknown key {key!r}; did you mean {nearest(key, known)!r}? known: {', '.join(sorted(known))}"


def nearest(name: Any, known: Iterable[str]) -> str:
    """The name that `name` most resembles."""
    import difflib

    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]


@lru_cache
def _fields(cls: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The annotation of each field of a dataclass, and the fields without a default."""
    hints, unset = get_type_hints(cls, include_extras=True), dataclasses.MISSING
    required = tuple(f.name for f in fields(cls) if f.default is unset and f.default_factory is unset)
    return {f.name: hints[f.name] for f in fields(cls)}, required


@dataclass(frozen=True)
class _Wanted:
    """An annotation taken apart, once for all the values that are held to it."""

    kind: Any
    origin: Any
    arguments: tuple[Any, ...]
    limits: tuple[Any, ...]
    is_section: bool


@lru_cache
def _wanted(hint: Any) -> _Wanted:
    limits: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        limits = tuple(rest)
    is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
    return _Wanted(hint, get_origin(hint), get_args(hint), limits, is_section)


def _of_kind(value: Any, wanted: _Wanted, where: str) -> Any:
    kind, origin, arguments = wanted.kind, wanted.origin, wanted.arguments
    if kind is Any:
        return value
    if wanted.is_section:
        content = {f.name: getattr(value, f.name) for f in fields(kind)} if isinstance(value, kind) else value
        return from_dict(kind, content, where)
    if origin in (Union, UnionType):
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else typed(value, other, where)
    if origin is dict:
        return {key: typed(item, arguments[1], f"{where}: {key}") for key, item in mapping(value, where).items()}
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise InvalidInput(f"{where}: expected a list, got {value!r}")
        return origin(typed(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value))
    return _plain(value, kind, where)


def _plain(value: Any, kind: Any, where: str) -> Any:
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is float and not math.isfinite(value)):
        raise InvalidInput(f"{where}: expected {_KINDS[kind]}, got {value!r}")
    return value
