"""Contact sheets: pictures enlarged without smoothing, each with its caption."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Sizes in px. A tile is what a picture is enlarged to, at whole multiples only.
_TILE, _GAP, _LINE, _FONT = 160, 14, 17, 13
_PAPER, _INK = (252, 252, 250), (40, 40, 40)


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6) -> bytes:
    """A PNG of uint8 (H, W, 3) images in rows of `columns`, the caption under each in at most two lines."""
    scale = max(1, _TILE // images[0].shape[1])
    width, height = images[0].shape[1] * scale, images[0].shape[0] * scale
    cell_width, cell_height = width + _GAP, height + 2 * _LINE + _GAP
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _GAP + k % columns * cell_width, _GAP + k // columns * cell_height
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for line, text in enumerate(_lines(caption, width, font)):
            pen.text((x + width / 2, y + height + 3 + line * _LINE), text, fill=_INK, font=font, anchor="ma")
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def _lines(caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    per_line = max(8, int(width / font.getlength("e")))
    return textwrap.wrap(caption, per_line, max_lines=2, placeholder=" ..")
