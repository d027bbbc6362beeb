"""What a value may be, whoever wrote the file."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from fluidscale.limits import (
    Amount,
    AtLeastOne,
    Count,
    Decay,
    InvalidInput,
    OneOf,
    Positive,
    Range,
    Share,
    checked,
    from_dict,
    typed,
)


@dataclass(frozen=True)
class Inner:
    n: Count = 0


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()
    rows: dict[str, AtLeastOne] = field(default_factory=dict)
    rate: Positive | None = None
    free: Any = None


def test_plain_data_becomes_what_the_annotations_say():
    content = {"inner": {"n": 3.0}, "names": ["a"], "rows": {"x": 1}, "rate": 2, "free": [None]}
    built = from_dict(Outer, content, "file")
    assert built == Outer(Inner(3), ("a",), {"x": 1}, 2.0, [None])
    assert type(built.inner.n) is int and type(built.rate) is float and checked(built, "file") == built
    assert from_dict(Outer, {"inner": None, "rate": None}, "file") == Outer(Inner())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "file: expected keys and values, got []"),
        ({}, "file: missing inner"),
        ({"inner": 3}, "file: inner: expected keys and values, got 3"),
        ({"inner": {"n": -1}}, "file: inner: n: expected at least 0, got -1"),
        ({"inner": {"n": 1.5}}, "file: inner: n: expected a whole number, got 1.5"),
        ({"inner": {"n": True}}, "file: inner: n: expected a whole number, got True"),
        ({"inner": {"m": 1}}, "file: inner: unknown key 'm'; did you mean 'n'? known: n"),
        ({"inner": {3: 1}}, "file: inner: unknown key '3'; did you mean 'n'? known: n"),
        ({"inner": {}, "names": "ab"}, "file: names: expected a list, got 'ab'"),
        ({"inner": {}, "names": ["a", 1]}, "file: names[1]: expected a text, got 1"),
        ({"inner": {}, "rows": {"x": 0}}, "file: rows: x: expected at least 1, got 0"),
        ({"inner": {}, "rate": "fast"}, "file: rate: expected a number, got 'fast'"),
        ({"inner": {}, "rate": math.nan}, "file: rate: expected a number, got nan"),
        ({"inner": {}, "rate": math.inf}, "file: rate: expected a number, got inf"),
    ],
)
def test_what_an_annotation_does_not_allow_is_refused_with_its_place(content, message):
    with pytest.raises(InvalidInput) as caught:
        from_dict(Outer, content, "file")
    assert str(caught.value) == message


def test_a_spec_that_was_made_by_hand_is_held_to_the_same():
    with pytest.raises(InvalidInput, match="spec: inner: n: expected at least 0, got -2"):
        checked(Outer(Inner(-2)), "spec")


@pytest.mark.parametrize(
    ("hint", "allowed", "refused"),
    [
        (Count, (0, 7), (-1,)),
        (AtLeastOne, (1,), (0,)),
        (Amount, (0.0, 0.5), (-1e-9,)),
        (Positive, (1e-30, 1e30), (0.0,)),
        (Share, (0.0, 1.0), (-0.1, 1.1)),
        (Decay, (0.0, 0.9999), (1.0, 2.0)),
        (Annotated[int, Range(least=2, below=4)], (2, 3), (1, 4)),
        (Annotated[str, OneOf(("cpu", "cuda"))], ("cpu",), ("gpu", "")),
        (bool, (True, False), ("no", 0, None)),
    ],
)
def test_a_range_holds_its_ends(hint, allowed, refused):
    for value in allowed:
        assert typed(value, hint, "here") == value
    for value in refused:
        with pytest.raises(InvalidInput, match=r"^here: "):
            typed(value, hint, "here")


def test_a_name_that_is_not_known_comes_with_the_nearest():
    with pytest.raises(InvalidInput) as caught:
        typed("lineer", Annotated[str, OneOf(("constant", "linear"))], "schedule")
    assert str(caught.value) == "schedule: unknown 'lineer'; did you mean 'linear'? known: constant, linear"
