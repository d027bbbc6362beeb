"""Published judges are asked before they judge: the same of the fixed pictures as when they were first used.

What a judge gave on the CPU is kept with its weights' sha256, in golden.json in its folder (beside a weights file in
FILE.golden.json), and asked again each time, on the device that will judge.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from fluidscale.evaluate.extract import Extractor
from fluidscale.evaluate.golden import compare, fixed_pictures
from fluidscale.evaluate.judges.clip import Clip
from fluidscale.evaluate.judges.mask2former import Mask2FormerDetector
from fluidscale.objects import COLORS
from fluidscale.record import read_json, write_json

GOLDEN = "golden.json"

Device = torch.device | str
Judge = TypeVar("Judge", Mask2FormerDetector, Clip, Extractor)


def detector_golden(detector: Mask2FormerDetector) -> list[list[float]]:
    """The ten best scores on each fixed picture; classes and boxes may change places where scores are equal."""
    scores = [[one.score for one in found[:10]] for found in detector.detect(fixed_pictures())]
    return [row + [0.0] * (10 - len(row)) for row in scores]


def clip_golden(clip: Clip) -> list[list[float]]:
    """The cosine of every fixed picture with every colour's name."""
    texts = clip.texts([f"a photo of a {color} object" for color in COLORS])
    return (clip.images(fixed_pictures()) @ texts.T).tolist()


def features_golden(network: Extractor) -> list[list[float]]:
    """The first features of every fixed picture."""
    return network(fixed_pictures())[:, :64].tolist()


def self_tested(
    load: Callable[[Path, Device], Judge], golden: Callable[[Judge], list[list[float]]], where: Path, device: Device
) -> Judge:
    """The judge in a folder or file, on `device`, after its self-test.

    Raises InvalidInput when it is none, or gives other values than when these weights were first used.
    """
    judge = load(where, device)
    path = where / GOLDEN if where.is_dir() else where.with_name(f"{where.name}.{GOLDEN}")
    kept: dict[str, Any] | None = read_json(path)
    if kept is None or kept.get("sha256") != judge.sha256:
        kept = {"sha256": judge.sha256, "values": golden(load(where, "cpu"))}
        # A folder shared by many may be read-only: then each use compares with the CPU of this machine.
        with suppress(OSError):
            write_json(path, kept)
    compare(kept["values"], golden(judge), str(path))
    return judge
