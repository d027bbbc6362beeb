"""Pictures inside the report: small enough to send the page, sharp enough to read it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from analysis.names import label_of, name_of

# flat figures and drawn scenes keep their look at this many colours, at a quarter of the bytes
COLOURS = 128


def embedded(png: bytes) -> str:
    """A PNG as a data URI with COLOURS colours, undithered: dither would blur thin lines and cost most of the gain."""
    with Image.open(io.BytesIO(png)) as image:
        flat = image.convert("RGB")
    content = io.BytesIO()
    flat.quantize(COLOURS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    best = min(content.getvalue(), png, key=len)
    return "data:image/png;base64," + base64.b64encode(best).decode()


def samples(doc: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Pictures by arm (rows) and size (columns, in order of N) that lie beside the table.

    One prompt's images where collecting left them in prompt/, else the contact sheets.
    """
    sizes: dict[str, float] = {}
    arms: dict[str, str] = {}
    for m in doc["measurements"]:
        arms[name_of(m["group"])] = label_of(m["group"])
        for size, n in zip(m["size"], m["n"], strict=True):
            sizes[size] = max(n or 0.0, sizes.get(size, 0.0))
    columns = sorted(filter(None, sizes), key=lambda s: sizes[s])
    text = folder / "prompt" / "prompt.txt"
    place = text.parent if text.is_file() else folder
    rows = []
    for arm, label in arms.items():
        paths = [place / f"{arm}-{size}.png" for size in columns]
        if any(p.is_file() for p in paths):
            rows.append((label, [embedded(p.read_bytes()) if p.is_file() else None for p in paths]))
    return {"sizes": columns, "rows": rows, "prompt": text.read_text().strip() if text.is_file() else ""}
