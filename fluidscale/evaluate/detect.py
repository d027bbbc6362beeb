"""The embedded world's detector: a heatmap of object centres per class, with box and colour read at each peak.

It only reports scored candidates; what counts as right is decided by the one scorer that also serves the official
detector. Objects as points: arXiv 1904.07850, with two changes: plain cross-entropy on the heatmap, because scores must
be probabilities (counting asks for > .9), and positives are all cells that touch a centre, not one of several equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluidscale.evaluate.golden import self_test
from fluidscale.evaluate.protocol import Detection
from fluidscale.kept import Kept
from fluidscale.spec import digest
from fluidscale.tokens.image import CHUNK, load_carded, to_pixels
from fluidscale.tokens.networks import ResidualBlock
from fluidscale.tokens.shipped import verified

# Pixels per heatmap cell.
STRIDE = 2
# Candidates below this are not reported; GenEval's own cut is .3 (.9 for counting).
LEAST_SCORE = 0.05
# Side of the window in which only the best cell is a peak, in cells: icons do not overlap and are 14 px wide or more.
PEAK_WINDOW = 5
# Around a centre: cells up to here are positive, up to NEAR neither positive nor negative. Px, per axis.
TOUCHING, NEAR = 1.0, 3.0
# Boxes are regressed in units of this many px, so that the four numbers are of order one.
BOX_UNIT = 16.0

_DETECTORS: Kept[IconDetector] = Kept(4)


class Target(NamedTuple):
    """One object as the detector learns it; `color` indexes the named colours, len(colors) means untinted."""

    cls: int
    color: int
    x0: float
    y0: float
    x1: float
    y1: float


class PyramidNetwork(nn.Module):
    """Three scales down and up again with skips; `widths` are the channels at strides 2, 4 and 8."""

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.fine = nn.Sequential(nn.PixelUnshuffle(STRIDE), nn.Conv2d(12, fine, 3, padding=1), ResidualBlock(fine))
        self.middle = nn.Sequential(nn.Conv2d(fine, middle, 2, stride=2), ResidualBlock(middle))
        self.coarse = nn.Sequential(
            nn.Conv2d(middle, coarse, 2, stride=2), ResidualBlock(coarse), ResidualBlock(coarse)
        )
        self.to_middle = nn.Sequential(nn.Conv2d(coarse, 4 * middle, 1), nn.PixelShuffle(2))
        self.back = ResidualBlock(middle)
        self.to_fine = nn.Sequential(nn.Conv2d(middle, 4 * fine, 1), nn.PixelShuffle(2))
        self.out = nn.Sequential(ResidualBlock(fine), nn.SiLU(), nn.Conv2d(fine, outputs, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        fine = self.fine(pixels)
        middle = self.middle(fine)
        middle = self.back(middle + self.to_middle(self.coarse(middle)))
        return self.out(fine + self.to_fine(middle))


class TowerNetwork(nn.Module):
    """One scale throughout, context by dilation alone: nothing is shared with the pyramid but the task."""

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        (width,) = widths
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(STRIDE),
            nn.Conv2d(12, width, 3, padding=1),
            *(ResidualBlock(width, kernel=1, dilation=dilation) for dilation in (1, 2, 4, 1, 2, 4, 1)),
            nn.SiLU(),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


SHAPES: dict[str, type[PyramidNetwork] | type[TowerNetwork]] = {"pyramid": PyramidNetwork, "tower": TowerNetwork}


class DetectorNetwork(nn.Module):
    """Per cell: a logit per class, the way to the box's four sides, and a logit per colour (the last: untinted)."""

    def __init__(self, shape: str, widths: Sequence[int], num_classes: int, num_colors: int) -> None:
        super().__init__()
        self.parts = (num_classes, 4, num_colors + 1)
        self.trunk = SHAPES[shape](widths, sum(self.parts))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, R, R) in [-1, 1] -> class logits (B, K, G, G), boxes (B, 4, G, G), colour logits (B, C + 1, G, G)."""
        heat, boxes, colors = self.trunk(pixels).split(self.parts, dim=1)
        # Centres are rare: starting at p = .02 spares the first hundred steps.
        return heat - 4.0, boxes, colors

    def loss(self, pixels: Tensor, objects: Sequence[Sequence[Target]]) -> Tensor:
        """Cross-entropy of centres and colours plus absolute error of boxes, per object; a scalar."""
        heat, boxes, colors = self(pixels)
        wanted, weight, rows = _heat_targets(objects, heat)
        total = F.binary_cross_entropy_with_logits(heat, wanted, weight, reduction="sum") / max(len(rows.cls), 1)
        if not len(rows.cls):
            return total
        at = (rows.image, slice(None), rows.y, rows.x)
        return total + F.l1_loss(boxes[at], rows.box) + F.cross_entropy(colors[at], rows.color)


class _Rows(NamedTuple):
    """The cells at objects: one row per (object, touching cell)."""

    image: Tensor
    cls: Tensor
    y: Tensor
    x: Tensor
    box: Tensor
    color: Tensor


def _heat_targets(objects: Sequence[Sequence[Target]], heat: Tensor) -> tuple[Tensor, Tensor, _Rows]:
    """Wanted heat, its weight (0 near a centre) and the rows whose box and colour are learnt."""
    flat = [(image, *target) for image, targets in enumerate(objects) for target in targets]
    table = torch.tensor(flat, dtype=torch.float32, device=heat.device).reshape(-1, 7)
    image, cls, color = table[:, :3].long().unbind(1)
    corners = table[:, 3:]
    middles = (torch.arange(heat.shape[-1], device=heat.device) + 0.5) * STRIDE
    cx, cy = corners[:, 0::2].mean(1, keepdim=True), corners[:, 1::2].mean(1, keepdim=True)
    distance = torch.maximum((middles - cx).abs()[:, None, :], (middles - cy).abs()[:, :, None])
    wanted, weight = torch.zeros_like(heat), torch.ones_like(heat)
    touching, near = distance <= TOUCHING + 1e-3, distance <= NEAR + 1e-3
    index, y, x = near.nonzero(as_tuple=True)
    weight[image[index], cls[index], y, x] = 0.0
    index, y, x = touching.nonzero(as_tuple=True)
    wanted[image[index], cls[index], y, x] = 1.0
    weight[image[index], cls[index], y, x] = 1.0
    here = torch.stack((middles[x], middles[y]), dim=1).repeat(1, 2)
    return wanted, weight, _Rows(image[index], cls[index], y, x, (corners[index] - here) / BOX_UNIT, color[index])


class IconDetector:
    """Scored boxes and colours on images of the world it was trained on; `sha256` names the weights."""

    def __init__(self, network: DetectorNetwork, card: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.name: str = card["name"]
        self.sha256: str = card["sha256"]
        self.classes: tuple[str, ...] = tuple(card["classes"])
        self.colors: tuple[str, ...] = tuple(card["colors"])

    @torch.inference_mode()
    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """All candidates with a score above .05, best first, for uint8 (B, H, W, 3).

        The colour is the best of the named ones even for an untinted object: like GenEval's, which has no "none".
        """
        found: list[list[Detection]] = []
        for start in range(0, len(images), CHUNK):
            found += self._detect(to_pixels(images[start : start + CHUNK], self.device))
        return found

    def _detect(self, pixels: Tensor) -> list[list[Detection]]:
        heat, boxes, colors = self.network(pixels)
        scores = heat.sigmoid()
        # Of logits: two scores next to each other may both round to 1.
        peaks = (F.max_pool2d(heat, PEAK_WINDOW, 1, PEAK_WINDOW // 2) == heat) & (scores > LEAST_SCORE)
        image, cls, y, x = peaks.nonzero(as_tuple=True)
        score = scores[image, cls, y, x]
        here = (torch.stack((x, y), dim=1) + 0.5) * STRIDE
        corners = (boxes[image, :, y, x] * BOX_UNIT + here.repeat(1, 2)).tolist()
        named = colors[image, : len(self.colors), y, x].argmax(1)
        found: list[list[Detection]] = [[] for _ in range(len(pixels))]
        for k, i, s, c, n in zip(image.tolist(), cls.tolist(), score.tolist(), corners, named.tolist(), strict=True):
            found[k].append(Detection(self.classes[i], s, (c[0], c[1], c[2], c[3]), self.colors[n]))
        return [sorted(candidates, key=lambda one: -one.score) for candidates in found]


def load_detector(name_or_path: str, device: torch.device | str = "cpu") -> IconDetector:
    """A shipped detector by name, or a user's by the path of its .safetensors (card beside it), hash-checked.

    Raises InvalidInput when it is missing, damaged or no detector. It is built and tested once a process, and its file
    looked at every time.
    """
    return _DETECTORS((digest(verified(name_or_path)[1]), str(device)), lambda: _load(name_or_path, device))


def _load(name_or_path: str, device: torch.device | str) -> IconDetector:
    network, card = load_carded(name_or_path, "detector", ("detector",), _of_card)
    judge = IconDetector(network, card, device)
    self_test(judge.network, card, name_or_path)
    return judge


def _of_card(card: dict[str, Any]) -> DetectorNetwork:
    return DetectorNetwork(**card["network"], num_classes=len(card["classes"]), num_colors=len(card["colors"]))
