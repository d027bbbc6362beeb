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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluidscale.evaluate.grid import contact_sheet
from fluidscale.evaluate.protocol import Progress, Subject, protocol_id, silent
from fluidscale.evaluate.samples import DRAWING, PROMPTS, Samples, read_image
from fluidscale.model.generator import generate
from fluidscale.model.transformer import Text
from fluidscale.record import atomic, write_atomic, write_json
from fluidscale.spec import canonical
from fluidscale.world.captions import PREFIX

# Tokens drawn in one batch: bounds memory; what is drawn does not depend on it.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Drawing:
    """Images to be drawn: by whom, of what set, and one entry of `prompts` (mappings with the text under `prompt`)
    for each. `samples` is the folder that holds them, or will."""

    subject: Subject
    name: str
    prompts: Sequence[Mapping[str, Any]]

    @cached_property
    def samples(self) -> Samples:
        rows, weights = _rows(self.prompts), self.subject.weights_sha256
        name = protocol_id(self.name, rows=rows, sampling=self.sampling, weights=weights)
        return Samples(self.subject.samples_dir / name, rows)

    @property
    def sampling(self) -> dict[str, Any]:
        return canonical(self.subject.spec.evaluate.sampling)

    @property
    def mine(self) -> Sequence[dict[str, Any]]:
        """The images that this process draws."""
        return self.subject.share.mine(self.samples.rows)

    def missing(self) -> list[dict[str, Any]]:
        """Those of them that are not there yet; the folder is opened for them."""
        folder = self.samples.folder
        missing = [row for row in self.mine if not (folder / row["file"]).exists()]
        if missing:
            facts = {"run_id": self.subject.spec.id, "sampling": self.sampling, "weights": self.subject.weights_sha256}
            write_atomic(folder / PROMPTS, "".join(json.dumps(row) + "\n" for row in self.samples.rows))
            write_json(folder / DRAWING, facts)
        return missing


def draw(subject: Subject, name: str, prompts: Sequence[Mapping[str, Any]], progress: Progress = silent) -> Samples:
    """Draws what is missing of one image per entry of `prompts`."""
    return draw_all([Drawing(subject, name, prompts)], progress)[0]


def draw_all(drawings: Sequence[Drawing], progress: Progress = silent) -> list[Samples]:
    """Draws what is missing of several sets: images of one model that differ in prompt, seed or guidance alone share
    batches. Several processes must make the same call."""
    distinct = list({drawing.samples.folder: drawing for drawing in drawings}.values())
    groups: dict[str, list[tuple[Drawing, dict[str, Any]]]] = {}
    for drawing in distinct:
        # Without guidance an image costs half, so it does not share a batch with those that have it.
        guided = drawing.sampling["guidance_scale"] != 1
        key = json.dumps([drawing.subject.weights_sha256, guided, {**drawing.sampling, "guidance_scale": 0}])
        groups.setdefault(key, []).extend((drawing, row) for row in drawing.missing())
    total = sum(len(drawing.mine) for drawing in distinct)
    done = total - sum(map(len, groups.values()))
    for group in groups.values():
        for drawn in _draw(group):
            done += drawn
            progress("drawing", done, total)
    for drawing in distinct:
        drawing.subject.share.wait()
        if not (drawing.samples.folder / "grid.png").exists():
            write_atomic(drawing.samples.folder / "grid.png", contact_sheet(*_showcase(drawing.samples)))
    return [drawing.samples for drawing in drawings]


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


def _draw(images: list[tuple[Drawing, dict[str, Any]]]) -> Iterator[int]:
    """Draws images that may share batches, and yields how many each batch had."""
    if not images:
        return
    subject = images[0][0].subject
    first = {row["prompt"]: number for number, (_, row) in reversed(list(enumerate(images)))}
    # All captions first: a word that is not known stops the drawing before it begins. A frozen encoder knows all words,
    # and its features of a whole set would not fit into memory.
    if subject.spec.model.text_vocab_size:
        subject.source.text(list(first))
    # Images of one caption side by side: it is encoded once a batch.
    images = sorted(images, key=lambda image: first[image[1]["prompt"]])
    batch = max(1, _BATCH_TOKENS // subject.spec.model.num_tokens)
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        captions = {row["prompt"]: None for _, row in part}
        places = {caption: place for place, caption in enumerate(captions)}
        text, which = subject.source.text(list(captions)), [places[row["prompt"]] for _, row in part]
        words, seeds = Text(text.values[which], text.mask[which]), [row["seed"] for _, row in part]
        sampling, scales = subject.spec.evaluate.sampling, [drawing.sampling["guidance_scale"] for drawing, _ in part]
        # One scale for all is a number: what was drawn before is drawn again bit for bit.
        mixed = len(set(scales)) > 1
        sampling = replace(sampling, guidance_scale=scales[0])
        tokens = generate(subject.model, words, sampling, seeds, scales=scales if mixed else None)
        for (drawing, row), image in zip(part, subject.tokenizer.decode(tokens), strict=True):
            _write_image(drawing.samples.folder / row["file"], image)
        yield len(part)


def _write_image(path: Path, image: np.ndarray) -> None:
    # Not flushed to disk one by one: a lost image is drawn again, at less than its flush costs.
    with atomic(path, flush=False) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def _showcase(samples: Samples, count: int = 24) -> tuple[list[np.ndarray], list[str]]:
    """Images and captions for the contact sheet, spread evenly over the prompts."""
    picked = np.unique(np.linspace(0, len(samples.rows) - 1, min(count, len(samples.rows))).round().astype(int))
    rows = [samples.rows[k] for k in picked]
    captions = [row["prompt"].removeprefix(PREFIX) for row in rows]
    return [read_image(samples.folder / row["file"]) for row in rows], captions
