"""Randomness as an argument: every draw comes from a generator that the caller names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def normal(shape: tuple[int, ...], rng: torch.Generator, device: torch.device) -> Tensor:
    """Standard normals drawn where the generator lives, so that a CPU generator gives one stream on every device."""
    return torch.randn(shape, generator=rng, device=rng.device).to(device, non_blocking=True)


@dataclass(frozen=True)
class ImageDraws:
    """Draws for `per_image` rows of each image, image-major, every image from a generator of its own.

    What image i draws depends on its generator alone, never on its neighbours in the batch.
    """

    generators: Sequence[torch.Generator]
    per_image: int
    device: torch.device

    def uniform(self) -> Tensor:
        """(M,) in [0, 1), M = images x per_image."""
        rows = [torch.rand(self.per_image, generator=rng, device=rng.device) for rng in self.generators]
        return torch.cat(rows).to(self.device, non_blocking=True)

    def normal(self, count: int, channels: int) -> Tensor:
        """(count, M, channels), M = images x per_image."""
        shape = (count, self.per_image, channels)
        rows = [torch.randn(shape, generator=rng, device=rng.device) for rng in self.generators]
        return torch.cat(rows, dim=1).to(self.device, non_blocking=True)
