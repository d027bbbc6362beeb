"""GenEval's rules (github.com/djghosh13/geneval, evaluation/evaluate_images.py): what counts as a correct image.

One implementation for every detector: the icon world's and the official one hand in scored boxes, and only this file
decides. Nothing here draws, loads or learns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from fluidscale.evaluate.protocol import Detection
from fluidscale.limits import InvalidInput, mapping
from fluidscale.world.captions import RELATIONS, TAGS

# evaluate_images.py: THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, POSITION_THRESHOLD (its NMS_THRESHOLD is 1.0: none).
THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, POSITION_THRESHOLD = 0.3, 0.9, 16, 0.1

_CLAUSE_KEYS = {"include": {"class", "count", "color", "position"}, "exclude": {"class", "count"}}


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt asks; `reason` says what is wrong; `found` is what was looked at."""

    correct: bool
    reason: str
    found: dict[str, list[Detection]]


def judge(
    detections: Iterable[Detection],
    prompt: Mapping[str, Any],
    color_of: Callable[[Detection], str] = attrgetter("color"),
) -> Verdict:
    """The verdict on one image: every include clause holds and no exclude clause is reached.

    `color_of` is asked only for objects whose colour the prompt names, so it may be costly.
    """
    found = admitted(detections, prompt["tag"])
    reasons: list[str] = []
    groups: list[list[Detection]] = []  # per include clause: its objects, empty when the clause failed
    for clause in prompt["include"]:
        best = found.get(clause["class"], [])[: clause["count"]]
        failure = _fails(clause, best, groups, color_of)
        if failure:
            reasons.append(failure)
        groups.append([] if failure else best)
    for clause in prompt.get("exclude", []):
        seen = len(found.get(clause["class"], []))
        if seen >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {seen}")
    return Verdict(not reasons, "\n".join(reasons), found)


def admitted(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Per class the best 16 detections above the tag's threshold, best first; equal scores keep their order."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        of_class = found.setdefault(detection.cls, [])
        if detection.score > threshold and len(of_class) < MAX_OBJECTS:
            of_class.append(detection)
    return {cls: members for cls, members in found.items() if members}


def relations(a: Detection, b: Detection) -> set[str]:
    """How `a` lies relative to `b`: up to two of RELATIONS, none when their boxes are nearly concentric.

    Each axis of the offset between centres is shortened by a tenth of the summed extents, then divided by the length
    of the whole, unshortened offset; beyond .5 the relation holds.
    """
    offsets, shortened = [], []
    for axis in (0, 1):
        offset = (a.box[axis] + a.box[axis + 2]) / 2 - (b.box[axis] + b.box[axis + 2]) / 2
        extent = abs(a.box[axis + 2] - a.box[axis]) + abs(b.box[axis + 2] - b.box[axis])
        offsets.append(offset)
        shortened.append(math.copysign(max(abs(offset) - POSITION_THRESHOLD * extent, 0.0), offset))
    if all(abs(s) < 1e-3 for s in shortened):
        return set()
    dx, dy = (s / math.hypot(*offsets) for s in shortened)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def check_prompts(prompts: Sequence[Mapping[str, Any]], classes: Collection[str], colors: Collection[str]) -> None:
    """Refuses, before anything is drawn, a prompt that could never be judged. Raises InvalidInput naming its line."""
    for line, prompt in enumerate(prompts, start=1):
        where = f"prompt {line} ({prompt.get('prompt', '')!r})"
        if not _is_one_of(prompt.get("tag"), TAGS):
            raise InvalidInput(f"{where}: unknown tag {prompt.get('tag')!r}; known: {', '.join(TAGS)}")
        text = prompt.get("prompt")
        if not isinstance(text, str) or not text or not prompt.get("include"):
            raise InvalidInput(f"{where}: needs a text under 'prompt' and at least one clause under 'include'")
        for kind, keys in _CLAUSE_KEYS.items():
            clauses = prompt.get(kind, [])
            if not isinstance(clauses, list):
                raise InvalidInput(f"{where}: {kind}: expected a list of clauses, got {clauses!r}")
            for index, clause in enumerate(clauses):
                _check_clause(clause, index, keys, classes, colors, f"{where}: {kind}[{index}]")


def _fails(
    clause: Mapping[str, Any],
    best: list[Detection],
    groups: list[list[Detection]],
    color_of: Callable[[Detection], str],
) -> str:
    """Why an include clause does not hold; empty when it does."""
    cls, count = clause["class"], clause["count"]
    if len(best) < count:
        return f"expected {cls}>={count}, found {len(best)}"
    if "color" in clause:
        colors = Counter(color_of(d) for d in best)
        if colors[clause["color"]] < count:
            others = ", ".join(f"{n} {color}" for color, n in sorted(colors.items()))
            return f"expected {clause['color']} {cls}>={count}, found {colors[clause['color']]}; {others}"
    if "position" in clause:
        wanted, target = clause["position"]
        if not groups[target]:
            return f"no target for {cls} to be {wanted}"
        for a in best:
            for b in groups[target]:
                held = relations(a, b)
                if wanted not in held:
                    return f"expected {cls} {wanted} target, found {' and '.join(sorted(held)) or 'no relation'}"
    return ""


def _check_clause(
    clause: Any,
    index: int,
    keys: set[str],
    classes: Collection[str],
    colors: Collection[str],
    where: str,
) -> None:
    unknown = set(mapping(clause, where)) - keys
    if unknown:
        raise InvalidInput(f"{where}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(sorted(keys))}")
    if not _is_one_of(clause.get("class"), classes):
        raise InvalidInput(f"{where}: the detector does not know {clause.get('class')!r}")
    if type(clause.get("count")) is not int or clause["count"] < 1:
        raise InvalidInput(f"{where}: count must be a whole number from 1, got {clause.get('count')!r}")
    if "color" in clause and not _is_one_of(clause["color"], colors):
        raise InvalidInput(f"{where}: unknown color {clause['color']!r}; known: {', '.join(colors)}")
    if "position" in clause:
        position = clause["position"]
        if not isinstance(position, list) or len(position) != 2:
            raise InvalidInput(f"{where}: position must be [relation, number of an earlier clause], got {position!r}")
        wanted, target = position
        if not _is_one_of(wanted, RELATIONS):
            raise InvalidInput(f"{where}: unknown relation {wanted!r}; known: {', '.join(RELATIONS)}")
        if type(target) is not int or not 0 <= target < index:
            raise InvalidInput(f"{where}: the target of a relation is an earlier clause, got {target!r}")


def _is_one_of(value: Any, names: Collection[str]) -> bool:
    # A list of names is not one of them, and cannot be looked up in a set.
    return isinstance(value, str) and value in names
