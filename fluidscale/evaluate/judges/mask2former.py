"""GenEval's own detector: Mask2Former with instance masks, post-processed as mmdet does for `inference_detector`.

transformers' own post-processing works at 384 x 384 and lets masks overwrite each other, which gives other boxes and
scores; so it is written here: softmax without the void class, the 100 best (query, class) pairs, masks resized to the
image before they are cut at 0, score = class probability x mean sigmoid inside the mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fluidscale.evaluate.judges.pretrained import load_pretrained
from fluidscale.evaluate.protocol import Detection
from fluidscale.objects import CLASSES, COLORS
from fluidscale.spec import InvalidInput

# mmdet: configs/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py: img_scale, size_divisor, img_norm_cfg.
LONG_SIDE, SHORT_SIDE, DIVISOR = 1333, 800, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# mmdet pads with this grey before it normalises (pad_cfg); square images are never padded.
PADDING = 128.0
# mmdet: test_cfg.max_per_image.
BEST = 100


class Mask2FormerDetector:
    """Scored boxes and masks on images of any one size; `sha256` names the weights. Colours are another model's."""

    classes = CLASSES
    colors = tuple(COLORS)

    def __init__(self, model: Any, sha256: str, name: str, device: torch.device) -> None:
        self.model, self.sha256, self.name, self.device = model, sha256, name, device
        if model.config.num_labels != len(CLASSES):
            raise InvalidInput(f"{name}: {model.config.num_labels} classes, GenEval's detector has {len(CLASSES)}")

    @torch.inference_mode()
    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """All candidates, best first, for uint8 (B, H, W, 3); boxes and masks in pixels of the image."""
        found: list[list[Detection]] = []
        for image in images:
            pixels, inner = prepared(image, self.device)
            output = self.model(pixel_values=pixels)
            classes, masks = output.class_queries_logits[0], output.masks_queries_logits
            masks = F.interpolate(masks.float(), pixels.shape[-2:], mode="bilinear", align_corners=False)
            masks = masks[:, :, : inner[0], : inner[1]]
            masks = F.interpolate(masks, image.shape[:2], mode="bilinear", align_corners=False)[0]
            found.append(instances(classes.float(), masks))
        return found


def prepared(image: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, tuple[int, int]]:
    """uint8 (H, W, 3) -> normalised (1, 3, h, w) and the size before padding.

    Keep-ratio resize to (1333, 800), bilinear without antialiasing and in 8 bits as OpenCV's, padded to whole 32s.
    """
    height, width = image.shape[:2]
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).movedim(-1, 0).float()[None]
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    down, right = (-length % DIVISOR for length in size)
    pixels = F.pad(pixels, (0, right, 0, down), value=PADDING)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std, size


def instances(classes: Tensor, masks: Tensor) -> list[Detection]:
    """Detections from class logits (Q, K + 1), the last void, and mask logits (Q, H, W) at the image's size."""
    scores = classes.softmax(-1)[:, :-1]
    values, flat = scores.flatten().topk(min(BEST, scores.numel()))
    queries, labels = flat // scores.shape[1], flat % scores.shape[1]
    found = []
    for query in queries.unique().tolist():
        mask = masks[query] > 0
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        # mmdet: sum(sigmoid inside) / (area + 1e-6). Without a pixel the score is 0 and nothing can be found.
        if not len(rows):
            continue
        quality = float((masks[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        region = mask.cpu().numpy()
        for index in (queries == query).nonzero().flatten().tolist():
            found.append(Detection(CLASSES[int(labels[index])], float(values[index]) * quality, box, mask=region))
    return sorted(found, key=lambda one: -one.score)


def load_mask2former(folder: Path, device: torch.device | str = "cpu") -> Mask2FormerDetector:
    """GenEval's detector from a local folder in transformers' format. Raises InvalidInput when it is not one."""
    model, sha256 = load_pretrained("Mask2FormerForUniversalSegmentation", folder, device)
    return Mask2FormerDetector(model, sha256, folder.name, torch.device(device))
