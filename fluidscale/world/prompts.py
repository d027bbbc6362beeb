"""Prompts in GenEval's file format (evaluation_metadata.jsonl): how many a task has, and reading a user's file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluidscale.spec import InvalidInput, WorldSpec
from fluidscale.world.captions import RELATIONS, TAGS, Content

# Prompts of each task in GenEval's own file (djghosh13/geneval).
PROTOCOL: dict[str, int] = dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))


def read_prompts(path: str | Path, check: Callable[[Any], None]) -> list[dict[str, Any]]:
    """The lines of a prompt file, as they are. InvalidInput names the first that is no JSON or that `check` refuses."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not readable ({error})") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line))
            check(prompts[-1])
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path}:{number}: not JSON ({error})") from error
        except InvalidInput as error:
            raise InvalidInput(f"{path}:{number}: {error}") from error
    if not prompts:
        raise InvalidInput(f"{path}: no prompts; expected one JSON object per line")
    return prompts


def check_text(prompt: Any) -> None:
    """Raises InvalidInput unless a prompt has a text to draw."""
    if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
        raise InvalidInput("expected a JSON object with a text under 'prompt'")


def read_content(prompt: Any, spec: WorldSpec) -> Content:
    """What a prompt asks for. Raises InvalidInput when it is not of GenEval's form or the world cannot draw it."""
    if not isinstance(prompt, Mapping):
        raise InvalidInput(f"expected a JSON object, got {type(prompt).__name__}")
    if missing := [key for key in ("tag", "include", "prompt") if key not in prompt]:
        raise InvalidInput(f"missing key {', '.join(missing)}")
    if prompt["tag"] not in TAGS:
        raise InvalidInput(f"unknown tag {prompt['tag']!r}; known: {', '.join(TAGS)}")
    if not isinstance(prompt["prompt"], str):
        raise InvalidInput(f"prompt must be a string, got {prompt['prompt']!r}")
    for key in ("include", "exclude"):
        _check_clauses(key, prompt.get(key, []), spec)
    clauses = prompt["include"]
    objects = tuple((clause["class"], clause.get("color")) for clause in clauses for _ in range(clause["count"]))
    if not 1 <= len(objects) <= spec.max_objects:
        raise InvalidInput(f"{len(objects)} objects; this world draws 1 to {spec.max_objects}")
    placed = [i for i, clause in enumerate(clauses) if "position" in clause]
    if not placed:
        return Content(prompt["tag"], objects)
    first, position = placed[0], clauses[placed[0]]["position"]
    if not (isinstance(position, Sequence) and len(position) == 2 and position[0] in RELATIONS):
        raise InvalidInput(f"position must be [relation, index of a clause]; relations: {', '.join(RELATIONS)}")
    if len(placed) > 1 or len(clauses) != 2 or len(objects) != 2 or position[1] != 1 - first:
        raise InvalidInput("position: this world places one object relative to one other")
    return Content(prompt["tag"], (objects[first], objects[1 - first]), position[0])


def _check_clauses(key: str, clauses: Any, spec: WorldSpec) -> None:
    if not isinstance(clauses, list) or not all(isinstance(clause, Mapping) for clause in clauses):
        raise InvalidInput(f"{key} must be a list of objects")
    for clause in clauses:
        if missing := [name for name in ("class", "count") if name not in clause]:
            raise InvalidInput(f"{key}: missing key {', '.join(missing)}")
        if clause["class"] not in spec.classes:
            raise InvalidInput(f"{key}: unknown class {clause['class']!r}; this world has {', '.join(spec.classes)}")
        if clause.get("color") not in (None, *spec.colors):
            raise InvalidInput(f"{key}: unknown color {clause['color']!r}; this world has {', '.join(spec.colors)}")
        if not isinstance(clause["count"], int) or clause["count"] < 1:
            raise InvalidInput(f"{key}: count must be a positive integer, got {clause['count']!r}")
