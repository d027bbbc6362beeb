"""DINOv2 as feature network: its distances follow people's judgement better than Inception's (arXiv 2306.04675).

The class token after the last norm, of images at 224 px, as that study takes it; its distance is FD-DINOv2, never FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fluidscale.evaluate.judges.pretrained import load_pretrained, pixels_of

# ImageNet's, as DINOv2 was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
BATCH = 64


class DinoFeatures:
    """uint8 (B, H, W, 3) -> float32 (B, F); `sha256` names the weights."""

    name = "dinov2"

    def __init__(self, model: Any, sha256: str, device: torch.device) -> None:
        self.model, self.sha256, self.device = model, sha256, device
        self.width: int = model.config.hidden_size

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(images), BATCH):
            pixels = pixels_of(images[start : start + BATCH], SIDE, MEAN, STD, self.device)
            parts.append(self.model(pixel_values=pixels).pooler_output.float().cpu().numpy())
        return np.concatenate(parts)


def load_dinov2(folder: Path, device: torch.device | str = "cpu") -> DinoFeatures:
    """From a local folder in transformers' format. Raises InvalidInput when it is not one."""
    model, sha256 = load_pretrained("Dinov2Model", folder, device)
    return DinoFeatures(model, sha256, torch.device(device))
