"""Prompts in GenEval's file format (evaluation_metadata.jsonl): how many a task has, and reading a user's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluidscale.spec import InvalidInput, WorldSpec
from fluidscale.world.captions import RELATIONS, TAGS, Content

# Prompts of each task in GenEval's own file (djghosh13/geneval).
PROTOCOL: dict[str, int] = dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))


def read_prompts(path: str | Path, spec: WorldSpec) -> list[dict[str, Any]]:
    """The lines of a prompt file, as they are. Raises InvalidInput naming the first line that the world cannot draw."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not readable ({error})") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path}:{number}: not JSON ({error})") from error
        read_content(prompt, spec, f"{path}:{number}")
        prompts.append(prompt)
    if not prompts:
        raise InvalidInput(f"{path}: no prompts; expected one JSON object per line")
    return prompts


def read_content(prompt: Mapping[str, Any], spec: WorldSpec, where: str) -> Content:
    """What a prompt asks for. Raises InvalidInput with `where` when a key is missing or the world lacks a name."""
    if not isinstance(prompt, Mapping):
        raise InvalidInput(f"{where}: expected a JSON object, got {type(prompt).__name__}")
    if missing := [key for key in ("tag", "include", "prompt") if key not in prompt]:
        raise InvalidInput(f"{where}: missing key {', '.join(missing)}")
    if prompt["tag"] not in TAGS:
        raise InvalidInput(f"{where}: unknown tag {prompt['tag']!r}; known: {', '.join(TAGS)}")
    if not isinstance(prompt["prompt"], str):
        raise InvalidInput(f"{where}: prompt must be a string")
    clauses, excluded = prompt["include"], prompt.get("exclude", [])
    for name, value in (("include", clauses), ("exclude", excluded)):
        if not isinstance(value, list) or not all(isinstance(clause, Mapping) for clause in value):
            raise InvalidInput(f"{where}: {name} must be a list of objects")
        for clause in value:
            _check_clause(clause, spec, f"{where}: {name}")
    objects = [(clause["class"], clause.get("color")) for clause in clauses for _ in range(clause["count"])]
    if not 1 <= len(objects) <= spec.max_objects:
        raise InvalidInput(f"{where}: {len(objects)} objects; this world draws 1 to {spec.max_objects}")
    placed = [(clause, clause["position"]) for clause in clauses if "position" in clause]
    if not placed:
        return Content(prompt["tag"], tuple(objects))
    clause, position = placed[0]
    if not (isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS):
        raise InvalidInput(f"{where}: position must be [relation, clause]; relations: {', '.join(RELATIONS)}")
    if len(objects) != 2 or len(placed) != 1 or clauses.index(clause) == position[1] or position[1] not in (0, 1):
        raise InvalidInput(f"{where}: this world places one object relative to one other")
    first = clauses.index(clause)
    return Content(prompt["tag"], (objects[first], objects[position[1]]), position[0])


def _check_clause(clause: Mapping[str, Any], spec: WorldSpec, where: str) -> None:
    if missing := [key for key in ("class", "count") if key not in clause]:
        raise InvalidInput(f"{where}: missing key {', '.join(missing)}")
    if clause["class"] not in spec.classes:
        raise InvalidInput(f"{where}: unknown class {clause['class']!r}; this world has {', '.join(spec.classes)}")
    if clause.get("color") not in (None, *spec.colors):
        raise InvalidInput(f"{where}: unknown color {clause['color']!r}; this world has {', '.join(spec.colors)}")
    if not isinstance(clause["count"], int) or clause["count"] < 1:
        raise InvalidInput(f"{where}: count must be a positive integer, got {clause['count']!r}")
