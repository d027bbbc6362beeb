"""One rule from a picture file to what a tokenizer sees."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

# Part of every manifest: the same rule by which the reference images of COCO-30K are prepared.
RULE = "upright by EXIF, over white, centre square of the shorter side, Lanczos to the resolution, RGB uint8"


def square(data: bytes, resolution: int) -> np.ndarray:
    """A picture file's bytes -> uint8 (R, R, 3) by RULE. Raises OSError, ValueError or SyntaxError on a bad one."""
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cut first: the filter would otherwise reach beyond the square.
    cut = image.crop((left, top, left + side, top + side))
    return np.asarray(cut.resize((resolution, resolution), Image.Resampling.LANCZOS))
