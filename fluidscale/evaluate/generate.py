"""The images of a prompt set, drawn once into a folder; every metric is computed from the folder.

    samples/<set>-<id>/prompts.jsonl    a line an image: file, prompt, seed, and the prompt's own facts
                       drawing.json     the run, its weights and how they were sampled
                       000000.png ..    as drawn, uint8, never JPEG
                       grid.png         a contact sheet for people

The id names prompts, sampling, seeds and weights, so a folder can only hold what it says. An image depends on its
prompt and its seed alone: an interrupted drawing continues with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluidscale.evaluate.grid import contact_sheet
from fluidscale.evaluate.protocol import Progress, Subject, protocol_id, silent
from fluidscale.evaluate.samples import DRAWING, PROMPTS, Samples, read_image
from fluidscale.model.generator import generate
from fluidscale.model.transformer import Text
from fluidscale.record import write_atomic, write_json
from fluidscale.spec import canonical
from fluidscale.world.captions import PREFIX

# Tokens drawn in one batch: bounds memory; what is drawn does not depend on it.
_BATCH_TOKENS = 4096


def draw(
    subject: Subject,
    name: str,
    prompts: Sequence[Mapping[str, Any]],
    progress: Progress = silent,
) -> Samples:
    """Draws what is missing of one image per entry of `prompts` (mappings with the text under `prompt`)."""
    rows = _rows(prompts)
    sampling = canonical(subject.spec.evaluate.sampling)
    folder = subject.samples_dir / protocol_id(name, rows=rows, sampling=sampling, weights=subject.weights_sha256)
    samples = Samples(folder, rows)
    missing = [row for row in subject.share.mine(rows) if not (folder / row["file"]).exists()]
    if missing:
        write_atomic(folder / PROMPTS, "".join(json.dumps(row) + "\n" for row in rows))
        write_json(
            folder / DRAWING, {"run_id": subject.spec.id, "sampling": sampling, "weights": subject.weights_sha256}
        )
        _draw(subject, folder, missing, len(subject.share.mine(rows)), progress)
    subject.share.wait()
    if not (folder / "grid.png").exists():
        write_atomic(folder / "grid.png", contact_sheet(*_showcase(samples)))
    return samples


def image_seed(prompt: str, index: int) -> int:
    """The seed of a prompt's image: the same for every model, and unmoved by the other prompts of the set."""
    return int.from_bytes(hashlib.sha256(f"{index}:{prompt}".encode()).digest()[:6], "big")


def _rows(prompts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    images: Counter[str] = Counter()  # how many a text has so far: a repeated one gets fresh seeds
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        text = prompt["prompt"]
        rows.append({"file": f"{len(rows):06d}.png", "seed": image_seed(text, images[text]), **prompt})
        images[text] += 1
    return tuple(rows)


def _draw(subject: Subject, folder: Path, rows: list[dict[str, Any]], total: int, progress: Progress) -> None:
    # All captions first: a word that is not known stops the drawing before it begins.
    text = subject.source.text([row["prompt"] for row in rows])
    batch = max(1, _BATCH_TOKENS // subject.spec.model.num_tokens)
    done = total - len(rows)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        words = Text(text.values[start : start + batch], text.mask[start : start + batch])
        tokens = generate(subject.model, words, subject.spec.evaluate.sampling, [row["seed"] for row in part])
        for row, image in zip(part, subject.tokenizer.decode(tokens), strict=True):
            _write_image(folder / row["file"], image)
        done += len(part)
        progress("drawing", done, total)


def _write_image(path: Path, image: np.ndarray) -> None:
    # Renamed into place but not flushed to disk one by one: a lost image is drawn again, at less than its flush costs.
    temporary = path.with_suffix(".tmp")
    Image.fromarray(image).save(temporary, format="PNG")
    os.replace(temporary, path)


def _showcase(samples: Samples, count: int = 24) -> tuple[list[np.ndarray], list[str]]:
    """Images and captions for the contact sheet, spread evenly over the prompts."""
    picked = np.unique(np.linspace(0, len(samples.rows) - 1, min(count, len(samples.rows))).round().astype(int))
    rows = [samples.rows[k] for k in picked]
    captions = [row["prompt"].removeprefix(PREFIX) for row in rows]
    return [read_image(samples.folder / row["file"]) for row in rows], captions
