"""Takes the scores of an outside judge into a run's folder.

A judge may be pinned to an old stack and know nothing of this program: it scores the folder of images and hands back
{"scores": [{"metric", "unit", "higher_is_better", "value", "se", "n", "protocol", "images_sha256", "extra"}]}. What
makes a score this run's is `images_sha256`: the images' own hash, which one of the run's folders must have.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fluidscale.evaluate.samples import DRAWING, read_samples
from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput

KEYS = {"metric": str, "unit": str, "higher_is_better": bool, "value": (int, float), "n": int, "protocol": str}


def merge(run_dir: Path, path: Path) -> list[str]:
    """Writes eval/<metric>.json for every score and returns a line for each.

    Scores of images drawn in another way than the run's own go to a folder of their own, as a variant's do. Raises
    InvalidInput, before anything is written, on a score that is not of this run's images or would replace another
    protocol's.
    """
    content = read_json(path)
    entries = (content or {}).get("scores")
    if not isinstance(entries, list) or not entries:
        raise InvalidInput(f"{path}: no scores; expected {{'scores': [..]}} as scores.json has them")
    folders = {read_samples(found.parent).sha256: found.parent for found in run_dir.glob("samples/**/prompts.jsonl")}
    placed = [(_target(run_dir, entry, folders, path), entry) for entry in entries]
    for target, entry in placed:
        there = read_json(target)
        if there is not None and there["protocol"] != entry["protocol"]:
            raise InvalidInput(
                f"{target}: holds {there['protocol']}, {path} has {entry['protocol']}; scores of two protocols are "
                "never one metric: move the file away if the new one is meant"
            )
    for target, entry in placed:
        drawing = read_json(folders[entry["images_sha256"]] / DRAWING) or {}
        kept = {key: entry[key] for key in (*KEYS, "se")}
        kept |= {"weights": drawing.get("weights", ""), "companions": []}
        write_json(target, kept | {"extra": {**entry.get("extra", {}), "merged_from": path.name}})
    return [f"{target}: {entry['value']:.5g}" for target, entry in placed]


def _target(run_dir: Path, entry: Any, folders: dict[str, Path], path: Path) -> Path:
    _check(entry, path)
    folder = folders.get(entry["images_sha256"])
    if folder is None:
        raise InvalidInput(f"{path}: {entry['metric']} is of images {entry['images_sha256'][:12]}.., not of this run's")
    # samples/[variant/]SET-ID: a variant's scores lie in eval/variant.
    return run_dir / "eval" / folder.relative_to(run_dir / "samples").parent / f"{entry['metric']}.json"


def _check(entry: Any, path: Path) -> None:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{path}: a score must be an object, got {entry!r}")
    for key, kind in {**KEYS, "images_sha256": str}.items():
        if not isinstance(entry.get(key), kind):
            raise InvalidInput(f"{path}: {entry.get('metric', 'a score')} has {key} {entry.get(key)!r}")
    if not entry["metric"].replace("_", "").isalnum():
        raise InvalidInput(f"{path}: {entry['metric']!r} is not a metric's name")
    se = entry.setdefault("se", None)
    if not math.isfinite(entry["value"]) or not (se is None or isinstance(se, (int, float))):
        raise InvalidInput(f"{path}: {entry['metric']} is {entry['value']} +- {se}")
