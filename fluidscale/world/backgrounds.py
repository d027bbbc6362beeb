"""What icons stand before: pastels at several brightnesses; a scene uses one that all its icons stand out from."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fluidscale.world.icons import body

# Rose, sand, lemon, mint, sky, lilac (RGB); light, so that black outlines keep every shape legible.
_PASTELS = np.array(
    [[244, 206, 206], [238, 218, 190], [240, 236, 186], [200, 232, 204], [196, 220, 242], [220, 206, 240]], np.float64
)

# Brightness jitter: factors of the pastel colour. The darkest still carries black, the lightest is no white.
_BRIGHTNESS = np.linspace(0.76, 0.96, 16)

# float64 (96, 3) RGB
BACKGROUNDS = (_BRIGHTNESS[:, None, None] * _PASTELS).reshape(-1, 3)

# CIE76 colour difference between icon and background; 2.3 is a just noticeable one.
MIN_CONTRAST = 28.0


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB colours (..., 3) from 0 to 255."""
    # IEC 61966-2-1: the sRGB transfer curve, and its primaries relative to the D65 white.
    value = np.asarray(rgb, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    # CIE 15: cube root with a linear toe.
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@lru_cache(maxsize=1024)
def _contrast(name: str, color: str | None) -> np.ndarray:
    """Colour difference of an icon to every background, (96,)."""
    return np.linalg.norm(lab(BACKGROUNDS) - lab(np.array(body(name, color))), axis=-1)


@lru_cache(maxsize=16384)
def fitting(icons: frozenset[tuple[str, str | None]]) -> np.ndarray:
    """Indices of the backgrounds that every icon (class, colour) stands out from; at least the best one."""
    least = np.min([_contrast(name, color) for name, color in icons], axis=0)
    return np.flatnonzero(least >= min(MIN_CONTRAST, least.max()))
