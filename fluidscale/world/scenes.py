"""A scene: its content with places, sizes and a background; and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluidscale.world.captions import Content, caption, metadata
from fluidscale.world.icons import Sprite, sprite


@dataclass(frozen=True)
class Icon:
    """One icon: centre and longest side in px, rotation in degrees counter-clockwise; color None: its natural ones."""

    cls: str
    color: str | None
    cx: float
    cy: float
    size: int
    rotation: int

    @property
    def sprite(self) -> Sprite:
        return sprite(self.cls, self.color, self.size, self.rotation)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in px of what is visible, the last two exclusive."""
        left, top = self._corner
        x0, y0, x1, y1 = self.sprite.box
        return (left + x0, top + y0, left + x1, top + y1)

    @property
    def _corner(self) -> tuple[int, int]:
        half = self.sprite.paint.shape[0] / 2
        return math.floor(self.cx - half + 0.5), math.floor(self.cy - half + 0.5)

    def draw(self, picture: np.ndarray) -> None:
        """Lays the icon on a float32 (R, R, 3) picture, in place."""
        image = self.sprite
        side = image.paint.shape[0]
        left, top = self._corner
        window = picture[top : top + side, left : left + side]
        window *= image.transparency
        window += image.paint


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture. background: colour at the middle, and its change per half side in x and y."""

    content: Content
    objects: tuple[Icon, ...]
    background: tuple[float, float, float]
    gradient: tuple[float, float]

    @property
    def tag(self) -> str:
        return self.content.tag

    @property
    def caption(self) -> str:
        return caption(self.content)

    @property
    def metadata(self) -> dict[str, Any]:
        return metadata(self.content)


def render(scenes: Sequence[Scene], resolution: int) -> np.ndarray:
    """Pictures uint8 (scenes, resolution, resolution, 3)."""
    line = ((np.arange(resolution) + 0.5) / resolution * 2 - 1).astype(np.float32)
    gradient = np.array([scene.gradient for scene in scenes], np.float32)
    light = 1 + gradient[:, :1] * line
    light = light[:, None, :] + (gradient[:, 1:] * line)[:, :, None]
    pictures = light[..., None] * np.array([scene.background for scene in scenes], np.float32)[:, None, None]
    for scene, picture in zip(scenes, pictures, strict=True):
        for icon in scene.objects:
            icon.draw(picture)
    # Half a step more before the fraction is cut off: to the nearest.
    return np.clip(pictures + 0.5, 0, 255).astype(np.uint8)
