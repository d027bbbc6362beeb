"""Pictures as a detector will meet them: a generator's flaws, made on purpose, so that judges agree on what is there.

Four kinds. Roughened: blur, tint and noise. Through a tokenizer: what any model's pictures look like at their best.
Shaken: every token shows the scene a little displaced, as where a model has drawn each by itself: what it shows is
there, if out of shape. Mingled: some tokens come from a second picture, of another scene or of the same content in
other places, which is what a model does that cannot decide where a thing goes. An icon that is no longer whole is then
no icon: without examples of such, two detectors that are right on every real scene draw that line in two places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fluidscale.evaluate.detect import Target
from fluidscale.tokens.image import Tokenizer, to_pixels
from fluidscale.tokens.quality import reconstruct

# Shares of pictures left as rendered, roughened, shaken and mingled; the rest goes through a tokenizer as it is.
KINDS = {"rendered": 0.2, "roughened": 0.15, "shaken": 0.2, "mingled": 0.3}
# How far, in px per axis, a token of a shaken picture may be displaced.
SHAKEN = 3.0
# The share of an icon's box that must be as it was for the icon to count as there.
WHOLE = 0.65
# Two icons of one class and colour this close, px per axis, are one: pictures mingled there still show it.
SAME_PLACE = 2.0

Objects = list[list[Target]]


@dataclass(frozen=True)
class Views:
    """Pictures float (B, 3, R, R) in [-1, 1] and what is there to be found in each."""

    pixels: Tensor
    objects: Objects


@dataclass(frozen=True)
class Pictures:
    """Rendered scenes uint8 (B, R, R, 3) and their objects."""

    images: np.ndarray
    objects: Objects

    def some(self, rows: np.ndarray) -> Pictures:
        """Those of the numbers in `rows`."""
        return Pictures(self.images[rows], [self.objects[i] for i in rows])


def judged_views(own: Pictures, seconds: Pictures, tokenizers: Sequence[Tokenizer]) -> Views:
    """Each picture with one kind of flaw, by torch's global generator; `seconds` are what it may be mingled with.

    Tokenizers take turns.
    """
    pixels, objects = to_pixels(own.images), list(own.objects)
    drawn = torch.bucketize(torch.rand(len(pixels)), torch.tensor([*KINDS.values()]).cumsum(0))
    kinds = {name: drawn == number for number, name in enumerate((*KINDS, "plain"))}
    if kinds["roughened"].any():
        pixels[kinds["roughened"]] = roughen(pixels[kinds["roughened"]])
    for which, tokenizer in enumerate(tokenizers):
        turn = torch.arange(len(pixels)) % len(tokenizers) == which
        rows = {name: (part & turn).nonzero()[:, 0].numpy() for name, part in kinds.items()}
        through = np.concatenate([rows["plain"], rows["shaken"]])
        if len(through):
            shaken = shake(own.images[rows["shaken"]], tokenizer.grid)
            pixels[through] = to_pixels(reconstruct(tokenizer, np.concatenate([own.images[rows["plain"]], shaken])))
        if len(half := rows["mingled"]):
            mingled = mingle(tokenizer, own.some(half), seconds.some(half))
            pixels[half] = to_pixels(mingled.images)
            for i, found in zip(half, mingled.objects, strict=True):
                objects[i] = found
    return Views(pixels, objects)


def roughen(pixels: Tensor) -> Tensor:
    """Blur, brightness, tint and noise of random small strength per picture."""
    per_image = (len(pixels), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = pixels.lerp(blurred, torch.rand(per_image))
    pixels = pixels * (1 + 0.1 * torch.randn(per_image)) + 0.05 * torch.randn(len(pixels), 3, 1, 1)
    return (pixels + 0.15 * torch.rand(per_image) * torch.randn_like(pixels)).clamp(-1, 1)


def shake(images: np.ndarray, grid: int) -> np.ndarray:
    """Each token's place shows the picture a few px beside it, each picture's more or less far."""
    count, resolution = images.shape[:2]
    far = SHAKEN * torch.rand(count, 1, 1, 1)
    moves = (far * (2 * torch.rand(count, 2, grid, grid) - 1)).round().long()
    moves = moves.repeat_interleave(resolution // grid, 2).repeat_interleave(resolution // grid, 3)
    places = torch.arange(resolution)
    rows = (places[:, None] + moves[:, 0]).clamp(0, resolution - 1).numpy()
    columns = (places + moves[:, 1]).clamp(0, resolution - 1).numpy()
    return images[np.arange(count)[:, None, None], rows, columns]


def mingle(tokenizer: Tokenizer, own: Pictures, seconds: Pictures) -> Pictures:
    """Each picture with a random set of its tokens, up to half of them, taken from the second's same places."""
    rng = torch.Generator().manual_seed(0)
    tokens, others = (tokenizer.sample(tokenizer.encode(p.images), rng) for p in (own, seconds))
    length = tokens.shape[1]
    counts = torch.randint(1, length // 2 + 1, (len(tokens), 1))
    kept = torch.rand(len(tokens), length).argsort(1).argsort(1) >= counts
    mixed = torch.where(kept if tokens.ndim == 2 else kept[..., None], tokens, others)
    cells = kept.view(-1, tokenizer.grid, tokenizer.grid).numpy()
    side = tokenizer.resolution // tokenizer.grid
    objects = [
        _whole(first, second, grid, side) + _whole(second, first, ~grid, side, again=False)
        for first, second, grid in zip(own.objects, seconds.objects, cells, strict=True)
    ]
    return Pictures(tokenizer.decode(mixed), objects)


def _whole(mine: list[Target], others: list[Target], cells: np.ndarray, side: int, again: bool = True) -> list[Target]:
    """Those of `mine` that `cells`, each `side` px wide, leave whole; one that both pictures have is whole anyway.

    again=False leaves out what both have: the other picture's list names it.
    """
    shared = [any(_same(one, other) for other in others) for one in mine]
    return [
        one for one, both in zip(mine, shared, strict=True) if (again if both else _share(one, cells, side) >= WHOLE)
    ]


def _same(one: Target, other: Target) -> bool:
    near = all(abs(a - b) <= SAME_PLACE for a, b in zip(one[2:], other[2:], strict=True))
    return near and one[:2] == other[:2]


def _share(target: Target, cells: np.ndarray, side: int) -> float:
    """The share of a box's area that lies in the cells marked, each `side` px wide."""
    edges = np.arange(cells.shape[0]) * side
    wide, high = (
        np.clip(np.minimum(edges + side, last) - np.maximum(edges, first), 0, None)
        for first, last in ((target.x0, target.x1), (target.y0, target.y1))
    )
    area = np.outer(high, wide)
    return float(area[cells].sum() / max(area.sum(), 1e-9))
