"""A folder of images and what each was asked to show: what every metric is computed from.

    prompts.jsonl          a line an image: file, prompt, seed, and the prompt's own facts
    000000.png ..          uint8, never JPEG

GenEval's own layout is read as well: 00000/metadata.jsonl with 00000/samples/0000.png ..
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fluidscale.spec import InvalidInput

PROMPTS, DRAWING = "prompts.jsonl", "drawing.json"


@dataclass(frozen=True)
class Samples:
    """A folder of images; `rows` are an image each, with its path in the folder under `file`."""

    folder: Path
    rows: tuple[dict[str, Any], ...]

    def images(self) -> np.ndarray:
        """All of them, uint8 (n, H, W, 3). Raises InvalidInput as `batches` does."""
        return np.concatenate(list(self.batches(max(len(self.rows), 1))))

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (up to `size`, H, W, 3) in the order of the rows: a set larger than memory can be judged.

        Raises InvalidInput on an image that is missing (before any is read), unreadable or of another size.
        """
        self.check_complete()
        first = None
        for start in range(0, len(self.rows), size):
            images = []
            for row in self.rows[start : start + size]:
                image = read_image(self.folder / row["file"])
                first = image.shape if first is None else first
                if image.shape != first:
                    raise InvalidInput(f"{self.folder / row['file']}: {image.shape[:2]}, the others {first[:2]}")
                images.append(image)
            yield np.stack(images)

    def check_complete(self) -> None:
        """Raises InvalidInput unless every image is there."""
        missing = [row["file"] for row in self.rows if not (self.folder / row["file"]).exists()]
        if missing:
            raise InvalidInput(
                f"{self.folder}: {len(missing)} of {len(self.rows)} images are missing, first {missing[0]}; "
                "a score of fewer would be another score: evaluate again to draw them"
            )

    def part(self, rank: int, ranks: int) -> Samples:
        """Every `ranks`-th image from the `rank`-th on: the share of one process."""
        return Samples(self.folder, self.rows[rank::ranks])

    @cached_property
    def sha256(self) -> str:
        """Names the images by their content, in order: what was computed from them is theirs wherever they lie."""
        self.check_complete()
        content = hashlib.sha256()
        for row in self.rows:
            content.update(hashlib.sha256((self.folder / row["file"]).read_bytes()).digest())
        return content.hexdigest()


def read_samples(folder: Path) -> Samples:
    """The images of a folder in our layout or GenEval's. Raises InvalidInput when it is neither."""
    listed = folder / PROMPTS
    if listed.exists():
        return Samples(folder, tuple(_lines(listed)))
    rows: list[dict[str, Any]] = []
    for metadata in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        (prompt,) = _lines(metadata)
        files = sorted((metadata.parent / "samples").glob("*.png"))
        index = int(metadata.parent.name)
        rows += [{**prompt, "index": index, "file": str(file.relative_to(folder))} for file in files]
    if not rows:
        raise InvalidInput(
            f"{folder}: no images to judge; expected {PROMPTS} or GenEval's 00000/metadata.jsonl folders"
        )
    return Samples(folder, tuple(rows))


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3). Raises InvalidInput when it is not a readable picture."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InvalidInput(f"{path}: not a readable PNG; delete it and evaluate again to draw it anew") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path}:{number}: not JSON ({error})") from error
    return rows
