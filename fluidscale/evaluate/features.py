"""The embedded world's feature network for the Fréchet distance: a classifier's last pooled layer.

It takes the place that Inception's pool layer has in FID, for pictures of which Inception knows nothing. Its distances
are named after it and never called FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluidscale.evaluate.golden import self_test
from fluidscale.tokens.image import CHUNK, load_carded, to_pixels
from fluidscale.tokens.networks import ResidualBlock


class FeatureNetwork(nn.Module):
    """Learns which (class, colour) pairs a scene holds and how often each class occurs; features are the pooled layer.

    `widths` are the channels at strides 2, 4 and 8; counts are told apart up to `max_count`. `shift` and `scale`
    z-score each feature over real scenes, so that distances are in units of what real scenes vary by.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int], features: int, num_classes: int, num_colors: int, max_count: int) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.max_count = max_count
        self.pooled = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, fine, 3, padding=1),
            ResidualBlock(fine),
            nn.Conv2d(fine, middle, 2, stride=2),
            ResidualBlock(middle),
            nn.Conv2d(middle, coarse, 2, stride=2),
            ResidualBlock(coarse),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(coarse, features),
            # Of equal length: without it rare outliers made the distance between two real sets twice as noisy.
            nn.LayerNorm(features, elementwise_affine=False),
        )
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.pairs = nn.Linear(features, num_classes * (num_colors + 1))
        self.counts = nn.Linear(features, num_classes * (max_count + 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, features), z-scored."""
        return (self.pooled(pixels) - self.shift) / self.scale

    @torch.no_grad()
    def measure_scaling(self, pixels: Tensor) -> None:
        """Sets shift and scale from real scenes; a feature that never varies keeps scale 1."""
        values = self.pooled(pixels)
        self.shift.copy_(values.mean(0))
        self.scale.copy_(torch.where(values.std(0) > 1e-4, values.std(0), 1.0))

    def loss(self, pixels: Tensor, pairs: Tensor) -> Tensor:
        """Cross-entropy over all questions; pairs int64 (B, K, C + 1): how many objects of each class and colour."""
        features = self.pooled(pixels)
        presence = F.binary_cross_entropy_with_logits(self.pairs(features), (pairs > 0).flatten(1).float())
        counts = self.counts(features).view(-1, self.max_count + 1)
        return presence + F.cross_entropy(counts, pairs.sum(2).clamp(max=self.max_count).flatten())

    def accuracy(self, pixels: Tensor, pairs: Tensor) -> float:
        """The share of scenes in which every (class, colour) pair is told right."""
        right = (self.pairs(self.pooled(pixels)) > 0) == (pairs > 0).flatten(1)
        return right.all(dim=1).float().mean().item()


class IconFeatures:
    """uint8 (B, H, W, 3) -> float32 (B, F); `sha256` names the weights."""

    def __init__(self, network: FeatureNetwork, card: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.name: str = card["name"]
        self.sha256: str = card["sha256"]
        self.width: int = card["network"]["features"]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The features of any number of images, in passes of bounded memory."""
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(images), CHUNK):
            parts.append(self.network(to_pixels(images[start : start + CHUNK], self.device)).cpu().numpy())
        return np.concatenate(parts)


def load_features(name_or_path: str, device: torch.device | str = "cpu") -> IconFeatures:
    """A shipped feature network by name, or a user's by path, hash-checked. Raises InvalidInput as the others do."""
    network, card = load_carded(name_or_path, "feature network", ("features",), _of_card)
    judge = IconFeatures(network, card, device)
    self_test(judge.network, card, name_or_path)
    return judge


def _of_card(card: dict[str, Any]) -> FeatureNetwork:
    return FeatureNetwork(**card["network"], num_classes=len(card["classes"]), num_colors=len(card["colors"]))
