"""A few fixed pictures that every judge must see as it did before, before it judges anything.

A kernel that fails or a changed library gives other numbers without a word. What the shipped networks gave is in
golden.json, under the hash of their weights; `python -m fluidscale.evaluate.keep_golden` writes it for new ones. What a
published judge gave is kept when it is first used (`judges.selftest`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fluidscale.objects import COLORS
from fluidscale.record import read_json
from fluidscale.spec import InvalidInput
from fluidscale.tokens.image import to_pixels

# Numbers of a GPU differ from a CPU's by rounding, of which TF32 has most; a failing kernel differs in the first digit.
TOLERANCE = 0.01
SHIPPED = Path(__file__).with_name("golden.json")


def fixed_pictures(side: int = 256) -> np.ndarray:
    """Three pictures of discs and bars on a gradient, uint8 (3, side, side, 3)."""
    y, x = np.mgrid[:side, :side] * (256 // side)
    pictures = []
    for k, (front, other) in enumerate((("red", "blue"), ("green", "white"), ("yellow", "purple"))):
        picture = np.stack([120 + x // 4, 140 + y // 8, 160 - x // 8], axis=-1)
        picture[(x - 90 - 20 * k) ** 2 + (y - 110) ** 2 < 45**2] = COLORS[front]
        picture[(abs(x - 190) < 30) & (abs(y - 150) < 50 - 10 * k)] = COLORS[other]
        pictures.append(picture.astype(np.uint8))
    return np.stack(pictures)


@torch.inference_mode()
def network_golden(network: nn.Module, side: int) -> list[list[float]]:
    """What a network gives for the fixed pictures: mean and deviation of each channel, six digits, a row a picture."""
    device = next(network.parameters()).device
    given = network(to_pixels(fixed_pictures(side), device))
    parts = [part.double().cpu() for part in ([given] if isinstance(given, Tensor) else given)]
    maps = torch.cat([part.flatten(2) if part.ndim > 2 else part[:, :, None] for part in parts], dim=1)
    values = torch.cat((maps.mean(2), maps.std(2, correction=0)), dim=1)
    return [[float(f"{value:.6g}") for value in row] for row in values.tolist()]


def compare(wanted: Any, found: Any, where: str) -> None:
    """Raises InvalidInput when a value differs by more than TOLERANCE, of 1 or of itself where it is larger."""
    wanted, found = np.asarray(wanted, float), np.asarray(found, float)
    alike = wanted.shape == found.shape
    if not alike or not np.all(np.abs(wanted - found) <= TOLERANCE * np.maximum(1, np.abs(wanted))):
        worst = float(np.abs(wanted - found).max()) if alike else float("inf")
        raise InvalidInput(
            f"{where}: on the fixed pictures this judge now differs by {worst:.3g} from what it saw before; "
            "a kernel fails or a library changed: judge on another device, or make the values anew"
        )


def self_test(network: nn.Module, card: dict[str, Any], where: str) -> None:
    """Raises InvalidInput when a network whose golden values are shipped gives others."""
    wanted = (read_json(SHIPPED) or {}).get(card["sha256"])
    if wanted is not None:
        compare(wanted, network_golden(network, card["resolution"]), where)
