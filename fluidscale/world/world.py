"""The embedded world: captioned scenes of icons without end, every one a function of (world, split, number)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluidscale.limits import InvalidInput, checked
from fluidscale.spec import WorldSpec, digest
from fluidscale.valid import check_world
from fluidscale.world.backgrounds import BACKGROUNDS, fitting
from fluidscale.world.captions import RELATIONS, TAGS, TEXT_LENGTH, Content, Vocabulary, metadata
from fluidscale.world.combinations import Combinations
from fluidscale.world.layouts import layouts
from fluidscale.world.prompts import PROTOCOL, read_content, read_prompts
from fluidscale.world.scenes import Icon, Scene, render

# Scenes of one block share a stream of random numbers, so that starting a stream costs little.
_BLOCK = 256

# Uniform numbers one scene is made of: tag, content, layout, background, gradient direction and strength; then the
# size and the rotation of up to four icons.
_DRAWS = 14

# The gradient changes a background's brightness by at most this fraction from the middle towards an edge.
_GRADIENT = 0.12

# Rotations are multiples of this many degrees, so that turned sprites can be kept.
_TURN = 5


class World:
    """Scenes, pictures, captions and prompts of one WorldSpec. Raises InvalidInput if the spec cannot be built."""

    def __init__(self, spec: WorldSpec) -> None:
        check_world(checked(spec, "world"), "world")
        self.spec = spec
        self.text_length = TEXT_LENGTH
        self._words = Vocabulary(spec)
        self._combinations = Combinations(spec)
        self._layouts: dict[tuple[int, str | None, tuple[str, ...]], np.ndarray] = {}
        # All but the barred ones at once: a world too tight for icons to be set one after another is refused here.
        for count in range(1, spec.max_objects + 1):
            self._places(count, None, ())
        for relation in RELATIONS:
            self._places(2, relation, ())

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words by id; index 0 is the padding."""
        return self._words.words

    def encode(self, caption: str) -> np.ndarray:
        """Word ids int64 (text_length,), padded with 0; "a photo of" is left out. InvalidInput on an unknown word."""
        return self._words.encode(caption)

    def sample(self, rng: np.random.Generator, split: str) -> Scene:
        """One scene: the split's tags equally likely, then the tag's contents equally likely."""
        return self._scene(rng.random(_DRAWS), split)

    def scene_for(self, prompt: Mapping[str, Any], rng: np.random.Generator) -> Scene:
        """A scene that satisfies a prompt of GenEval's file format. InvalidInput if this world cannot draw it."""
        return self._place(read_content(prompt, self.spec), rng.random(_DRAWS))

    def describe(self, start: int, count: int, split: str = "train") -> list[Scene]:
        """Scenes start .. start + count - 1 of a split: the same ones however the range is cut."""
        return [self._scene(draws, split) for draws in self._draws(start, count, split)]

    def render(self, scene: Scene) -> np.ndarray:
        """The scene's picture, uint8 (R, R, 3)."""
        return render([scene], self.spec.resolution)[0]

    def scenes(self, start: int, count: int, split: str = "train") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pictures uint8 (n, R, R, 3), captions int64 (n, T), tags int8 (n,): index into TAGS) of `describe`."""
        side = self.spec.resolution
        pictures = np.empty((count, side, side, 3), np.uint8)
        captions = np.empty((count, self.text_length), np.int64)
        tags = np.empty(count, np.int8)
        for first in range(0, count, _BLOCK):
            scenes = self.describe(start + first, min(_BLOCK, count - first), split)
            part = slice(first, first + len(scenes))
            pictures[part] = render(scenes, side)
            captions[part] = [self._words.encode(scene.caption) for scene in scenes]
            tags[part] = [TAGS.index(scene.tag) for scene in scenes]
        return pictures, captions, tags

    def prompts(
        self, split: str, limit: Mapping[str, int] | None = None, part: str = "evaluation"
    ) -> list[dict[str, Any]]:
        """Distinct prompts in GenEval's file format, chosen by the world's seed: per tag GenEval's own number (or
        `limit[tag]`) of them, or all there are if there are fewer: none of a split that the world does not have.

        split: "seen" | "unseen" (which has no single_object and no counting). part: "evaluation", or "validation" for
        whatever is chosen by score. The two take from opposite ends of one order: they share no prompt as long as
        both fit in what there is, and as few as possible otherwise.
        """
        if split not in ("seen", "unseen") or part not in ("evaluation", "validation"):
            raise InvalidInput(f"prompts: no {part!r} part of split {split!r}; seen | unseen, evaluation | validation")
        chosen: list[dict[str, Any]] = []
        for tag in TAGS:
            numbers = _rng(self.spec, f"prompts {split} {tag}").permutation(self._combinations.numbers(tag, split))
            if part == "validation":
                numbers = numbers[::-1]
            wanted = PROTOCOL[tag] if limit is None else limit.get(tag, 0)
            chosen += [metadata(self._combinations.content(tag, number)) for number in numbers[:wanted]]
        return chosen

    def read_prompts(self, path: str | Path) -> list[dict[str, Any]]:
        """A user's prompt file; InvalidInput names the line that is broken or that this world cannot draw."""

        def check(prompt: Any) -> None:
            read_content(prompt, self.spec)
            self.encode(prompt["prompt"])

        return read_prompts(path, check)

    def is_unseen(self, prompt: Mapping[str, Any]) -> bool:
        """Whether a prompt contains a combination held out of training."""
        return self._combinations.is_unseen(read_content(prompt, self.spec))

    def _draws(self, start: int, count: int, split: str) -> Iterator[np.ndarray]:
        """The uniform numbers of scenes start .. start + count - 1, (_DRAWS,) each."""
        key = _key(self.spec, split)
        for block in range(start // _BLOCK, -(-(start + count) // _BLOCK)):
            # Blocks differ in the second word of Philox's counter; the first counts within a block.
            rng = np.random.Generator(np.random.Philox(key=key, counter=[0, block, 0, 0]))
            first = block * _BLOCK
            yield from rng.random((_BLOCK, _DRAWS))[max(start - first, 0) : start + count - first]

    def _scene(self, draws: np.ndarray, split: str) -> Scene:
        tags = self._combinations.tags(split)
        tag = tags[int(draws[0] * len(tags))]
        numbers = self._combinations.numbers(tag, split)
        return self._place(self._combinations.content(tag, numbers[int(draws[1] * len(numbers))]), draws)

    def _places(self, count: int, relation: str | None, barred: tuple[str, ...]) -> np.ndarray:
        key = (count, relation, barred)
        if key not in self._layouts:
            self._layouts[key] = layouts(self.spec, *key)
        return self._layouts[key]

    def _place(self, content: Content, draws: np.ndarray) -> Scene:
        """Gives a content places, sizes, rotations and a background from uniform numbers."""
        count = len(content.objects)
        places = self._places(count, content.relation, self._combinations.barred(content))
        base, jitter = self.spec.icon_sizes[count - 1], self.spec.size_jitter
        small, large = math.ceil(base * (1 - jitter)), math.floor(base * (1 + jitter))
        turns = int(self.spec.rotation_degrees // _TURN)
        u = draws.tolist()
        icons = tuple(
            Icon(name, color, x, y, small + int(a * (large - small + 1)), _TURN * (int(b * (2 * turns + 1)) - turns))
            for (name, color), (x, y), a, b in zip(
                content.objects, places[int(u[2] * len(places))].tolist(), u[6:], u[10:], strict=False
            )
        )
        colors = fitting(frozenset(content.objects))
        background = tuple(BACKGROUNDS[colors[int(u[3] * len(colors))]].tolist())
        angle, strength = 2 * math.pi * u[4], _GRADIENT * u[5]
        return Scene(content, icons, background, (strength * math.cos(angle), strength * math.sin(angle)))


def _key(spec: WorldSpec, use: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{digest(spec)} {use}".encode()).digest()[:16], "big")


def _rng(spec: WorldSpec, use: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_key(spec, use)))
