"""A few fixed pictures that every judge must see as it did before, before it judges anything.

A kernel that fails or a changed library gives other numbers without a word. What a judge saw on the CPU is kept beside
its weights as golden.json when it is first used, and asked again each time, on the device that will judge.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fluidscale.evaluate.judges.clip import Clip
from fluidscale.evaluate.judges.mask2former import Mask2FormerDetector
from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput
from fluidscale.world.classes import COLORS

GOLDEN = "golden.json"
# Scores and cosines on a GPU differ from a CPU's by rounding; a failing kernel differs in the first digit.
TOLERANCE = 0.01
_SIDE = 256


def fixed_pictures() -> np.ndarray:
    """Three pictures of discs and bars on a gradient, uint8 (3, 256, 256, 3)."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    pictures = []
    for k, (front, other) in enumerate((("red", "blue"), ("green", "white"), ("yellow", "purple"))):
        picture = np.stack([120 + x // 4, 140 + y // 8, 160 - x // 8], axis=-1)
        picture[(x - 90 - 20 * k) ** 2 + (y - 110) ** 2 < 45**2] = COLORS[front]
        picture[(abs(x - 190) < 30) & (abs(y - 150) < 50 - 10 * k)] = COLORS[other]
        pictures.append(picture.astype(np.uint8))
    return np.stack(pictures)


def detector_golden(detector: Mask2FormerDetector) -> dict[str, Any]:
    """The ten best scores on each fixed picture; classes and boxes may change places where scores are equal."""
    scores = [[one.score for one in found[:10]] for found in detector.detect(fixed_pictures())]
    return {"values": [row + [0.0] * (10 - len(row)) for row in scores]}


def clip_golden(clip: Clip) -> dict[str, Any]:
    """The cosine of every fixed picture with every colour's name."""
    texts = clip.texts([f"a photo of a {color} object" for color in COLORS])
    return {"values": (clip.images(fixed_pictures()) @ texts.T).tolist()}


def check_golden(folder: Path, sha256: str, measured: dict[str, Any], on_cpu: Callable[[], dict[str, Any]]) -> None:
    """Compares with golden.json, which is written first from `on_cpu` where there is none of these weights.

    Raises InvalidInput when a value differs by more than TOLERANCE.
    """
    path = folder / GOLDEN
    golden = read_json(path)
    if golden is None or golden.get("sha256") != sha256:
        golden = {"sha256": sha256, **on_cpu()}
        # A folder shared by many may be read-only: then each use compares with the CPU of this machine.
        with suppress(OSError):
            write_json(path, golden)
    wanted, found = (np.asarray(one["values"], float) for one in (golden, measured))
    if wanted.shape != found.shape or not np.all(np.abs(wanted - found) <= TOLERANCE):
        worst = float(np.abs(wanted - found).max()) if wanted.shape == found.shape else float("inf")
        raise InvalidInput(
            f"{path}: on the fixed pictures this judge now differs by {worst:.3g} from what it saw before; "
            "a kernel fails or a library changed: judge on another device, or delete the file if the change is known"
        )
