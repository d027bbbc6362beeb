"""Which contents a world has, which of them training never shows, and how the two sides are told apart.

Three kinds of combination are held out, by the world's seed and never a whole class, colour or relation:
(class, colour) pairs; class pairs, in either order and in every task; and (first, relation, second) triples among the
remaining pairs, each together with its mirror image ("a left of b" and "b right of a" are one picture). A content is
unseen when it contains at least one of them. single_object and counting contain none: they have no unseen part.
Pictures keep to it as well as captions: where a caption leaves two icons free, they avoid the held-out relations. Only
natural colours are as they are: training may show a red apple as "an apple" though "a red apple" is held out.
"""

from __future__ import annotations

import functools
import hashlib
import json

import numpy as np

from fluidscale.objects import UNCOLORED
from fluidscale.spec import InvalidInput, WorldSpec
from fluidscale.world.captions import RELATIONS, TAGS, Content

# train and seen draw from the same contents by different random streams.
SPLITS = ("train", "seen", "unseen", "all")

_KEPT_CONTENTS = 2**14


class Combinations:
    """All contents of a world, numbered per tag."""

    def __init__(self, spec: WorldSpec) -> None:
        self._spec = spec
        self._tintable = np.array([i for i, name in enumerate(spec.classes) if name not in UNCOLORED], np.int64)
        self.held_colors, self.held_pairs, self.held_relations = _hold_out(spec, self._tintable)
        # Scenes ask for the same contents again and again; a large world's are too many to keep them all.
        self.content = functools.lru_cache(_KEPT_CONTENTS)(self._content)
        self._numbers: dict[tuple[str, str], np.ndarray] = {}
        for tag in TAGS:
            unseen = self._unseen(tag)
            self._numbers[tag, "all"] = np.arange(len(unseen))
            self._numbers[tag, "unseen"] = np.flatnonzero(unseen)
            self._numbers[tag, "train"] = self._numbers[tag, "seen"] = np.flatnonzero(~unseen)

    def numbers(self, tag: str, split: str) -> np.ndarray:
        """The contents of a tag that belong to a split, int64 (n,), to be read with `content`."""
        return self._numbers[tag, split]

    def tags(self, split: str) -> tuple[str, ...]:
        """The tags that have a content in the split. Raises InvalidInput where none has, or there is no such split."""
        if split not in SPLITS:
            raise InvalidInput(f"split {split!r}: expected one of {', '.join(SPLITS)}")
        tags = tuple(tag for tag in TAGS if len(self._numbers[tag, split]))
        if not tags:
            raise InvalidInput(f"split {split!r}: this world holds nothing out; see its holdout_fraction")
        return tags

    def _content(self, tag: str, number: int) -> Content:
        """The content of a tag with this number."""
        i, j, k, m, r = (int(v) for v in self._indices(tag, np.array([number]))[:, 0])
        names, colors = self._spec.classes, (*self._spec.colors, None)
        if tag == "counting":
            return Content(tag, ((names[i], None),) * (j + 2))
        second = ((names[j], colors[m]),) if j >= 0 else ()
        return Content(tag, ((names[i], colors[k]), *second), RELATIONS[r] if r >= 0 else None)

    def is_unseen(self, content: Content) -> bool:
        """Whether the content, of this world or put together by a user, contains a held-out combination."""
        classes = [self._spec.classes.index(name) for name, _ in content.objects]
        held = [
            self.held_colors[i, self._spec.colors.index(c)]
            for i, (_, c) in zip(classes, content.objects, strict=True)
            if c
        ]
        held += [self.held_pairs[i, j] for i in classes for j in classes]
        if content.relation:
            held.append(self.held_relations[classes[0], classes[1], RELATIONS.index(content.relation)])
        return bool(np.any(held))

    def barred(self, content: Content) -> tuple[str, ...]:
        """The held-out relations in which the first of two freely placed icons must not stand to the second."""
        if content.relation or len(content.objects) != 2:
            return ()
        first, second = (self._spec.classes.index(name) for name, _ in content.objects)
        return tuple(np.array(RELATIONS)[self.held_relations[first, second]].tolist())

    def _shape(self, tag: str) -> tuple[int, ...]:
        classes, tintable, colors = len(self._spec.classes), len(self._tintable), len(self._spec.colors)
        return {
            "single_object": (classes,),
            "counting": (classes, self._spec.max_objects - 1),
            "colors": (tintable, colors),
            "two_object": (classes, classes - 1),
            "position": (classes, classes - 1, len(RELATIONS)),
            "color_attr": (tintable, tintable - 1, colors, colors - 1),
        }[tag]

    def _indices(self, tag: str, numbers: np.ndarray) -> np.ndarray:
        """(5, n): first class, second class (counting: count - 2), first colour, second colour, relation; -1 = none."""
        parts = np.unravel_index(numbers, self._shape(tag))
        out = np.full((5, len(numbers)), -1, np.int64)
        rows = {"colors": (0, 2), "position": (0, 1, 4), "color_attr": (0, 1, 2, 3)}.get(tag, (0, 1)[: len(parts)])
        out[list(rows)] = parts
        if tag in ("two_object", "position", "color_attr"):
            # The second is another class than the first, and its colour another colour: skip over the first's.
            out[1] += out[1] >= out[0]
        if tag == "color_attr":
            out[3] += out[3] >= out[2]
            out[1] = self._tintable[out[1]]
        if tag in ("colors", "color_attr"):
            out[0] = self._tintable[out[0]]
        return out

    def _unseen(self, tag: str) -> np.ndarray:
        numbers = np.arange(int(np.prod(self._shape(tag))))
        i, j, k, m, r = self._indices(tag, numbers)
        unseen = np.zeros(len(numbers), bool)
        if tag in ("colors", "color_attr"):
            unseen |= self.held_colors[i, k]
        if tag == "color_attr":
            unseen |= self.held_colors[j, m]
        if tag in ("two_object", "position", "color_attr"):
            unseen |= self.held_pairs[i, j]
        if tag == "position":
            unseen |= self.held_relations[i, j, r]
        return unseen


def _hold_out(spec: WorldSpec, tintable: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boolean tables (C, colours), (C, C) symmetric, (C, C, 4) equal to its mirror image."""
    # Resolution and layout play no part: the same world at 64 px holds out the same combinations.
    key = json.dumps([spec.seed, spec.holdout_fraction, spec.classes, spec.colors])
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big"))
    classes = len(spec.classes)
    cells = [(int(i), k) for i in tintable for k in range(len(spec.colors))]
    held_colors = np.zeros((classes, len(spec.colors)), bool)
    for i, k in _choose(cells, spec.holdout_fraction, rng):
        held_colors[i, k] = True
    held_pairs = np.zeros((classes, classes), bool)
    pairs = [(i, j) for i in range(classes) for j in range(i)]
    chosen = _choose(pairs, spec.holdout_fraction, rng, one_kind=True)
    for i, j in chosen:
        held_pairs[i, j] = held_pairs[j, i] = True
    held_relations = np.zeros((classes, classes, len(RELATIONS)), bool)
    remaining = [((i, j), r) for i, j in pairs if not held_pairs[i, j] for r in range(len(RELATIONS))]
    for (i, j), r in _choose(remaining, spec.holdout_fraction, rng):
        held_relations[i, j, r] = held_relations[j, i, r ^ 1] = True
    return held_colors, held_pairs, held_relations


def _choose(cells: list, fraction: float, rng: np.random.Generator, one_kind: bool = False) -> list:
    """A `fraction` of the (row, column) cells, at random, leaving every row and every column at least half of its own.

    one_kind: rows and columns are the same things (class pairs), so a thing's cells are counted over both.
    """
    names = [(("r", a), ("r" if one_kind else "c", b)) for a, b in cells]
    room: dict = {}
    for pair in names:
        for name in pair:
            room[name] = room.get(name, 0) + 0.5
    chosen = []
    for n in rng.permutation(len(cells)):
        if len(chosen) >= round(fraction * len(cells)):
            break
        if all(room[name] >= 1 for name in names[n]):
            chosen.append(cells[n])
            for name in names[n]:
                room[name] -= 1
    return chosen
