"""Where icons may stand: layouts without overlap, listed once per number of icons and relation, then drawn from."""

from __future__ import annotations

import numpy as np

from fluidscale.spec import InvalidInput, WorldSpec
from fluidscale.valid import icon_extent, no_room
from fluidscale.world.captions import RELATIONS

# More than two icons have too many layouts to list them all: this many are drawn.
_DRAWN = 20_000
_CHUNK = 1_000

# GenEval's rule of position (evaluation/evaluate_images.py): tolerance in box sizes, and the cosine of the direction.
_TOLERANCE = 0.1
_COSINE = 0.5


def layouts(spec: WorldSpec, count: int, relation: str | None, barred: tuple[str, ...]) -> np.ndarray:
    """Centres in px, float32 (layouts, count, 2) as (x, y), each equally likely. Raises InvalidInput if there are none.

    With a relation, the first of two icons stands in that relation to the second by GenEval's rule, and in no other;
    it never stands in a barred one.
    """
    side = icon_extent(spec, count)
    room = spec.resolution - side
    line = np.arange(0, room + 1, spec.position_step) + (room % spec.position_step) // 2 + side / 2
    points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    offset = points[:, None] - points[None]
    apart: np.ndarray = np.any(np.abs(offset) >= side, axis=-1)
    if relation or barred:
        holds = _relations(offset, spec.icon_sizes[count - 1])
        apart &= ~holds[..., [RELATIONS.index(name) for name in barred]].any(-1)
        if relation:
            apart &= holds[..., RELATIONS.index(relation)] & (holds.sum(-1) == 1)
    if count == 1:
        chosen = points[:, None]
    elif count == 2:
        chosen = points[np.argwhere(apart)]
    else:
        chosen = points[_draw(apart, count)]
    if not len(chosen):
        raise InvalidInput(f"world: {no_room(spec, count)}")
    return chosen.astype(np.float32)


def _relations(offset: np.ndarray, size: int) -> np.ndarray:
    """Which of RELATIONS hold for centre offsets first - second (..., 2): bool (..., 4)."""
    beyond = np.maximum(np.abs(offset) - _TOLERANCE * 2 * size, 0) * np.sign(offset)
    cosine = beyond / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-9)
    return np.stack([cosine < -_COSINE, cosine > _COSINE], -1).reshape(*offset.shape[:-1], 4)


def _draw(apart: np.ndarray, count: int) -> np.ndarray:
    """Random layouts (n, count) of indices into the points: icons set one after another wherever there is room."""
    # A fixed stream: a world's list of layouts is part of what it is.
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWN // _CHUNK):
        free = np.ones((_CHUNK, len(apart)), bool)
        chosen = np.empty((_CHUNK, 0), np.int64)
        for _ in range(count):
            ranks = rng.random(free.shape, np.float32) * free
            point = ranks.argmax(1)
            possible = free.any(1)
            chosen = np.concatenate([chosen, point[:, None]], 1)[possible]
            free = free[possible] & apart[point[possible]]
        drawn.append(chosen)
    return np.concatenate(drawn)
