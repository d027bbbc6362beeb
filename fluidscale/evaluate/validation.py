"""The fixed validation images, with everything random fixed too, and one loop over them.

Masks, orders and noise depend on the image's index alone, never on the model, so the difference between two models is
free of their noise (common random numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluidscale.data.sources import WORLD_VALIDATION
from fluidscale.evaluate.protocol import Progress, Subject, protocol_id
from fluidscale.kept import Kept
from fluidscale.model.order import View
from fluidscale.model.transformer import Text
from fluidscale.spec import canonical

# Part of the protocol: noise is stratified over the tokens of one batch, so another size would be other noise.
BATCH = 64
# Views per image where one view shows only part of the tokens' losses.
DRAWS = 4
SEED = 20240

# Tokens and views of the runs before, which are asked the same: bytes that each may take.
_TOKENS: Kept[Tensor] = Kept(2**26, weigh=lambda tokens: tokens.nbytes)
_VIEWS: Kept[View] = Kept(2**26, weigh=lambda view: view.reads.nbytes + view.counted.nbytes)

# Nats or losses (B, S) of a batch's slots, 0 where they do not count, from (tokens, text, view, generator).
Measure = Callable[[Tensor, Text, View, torch.Generator], Tensor]


@dataclass(frozen=True)
class Views:
    """What images are asked, each in `draws` ways: `of` (image, draw). `name` says everything that decides it, so that
    a process which evaluates many runs draws it once."""

    name: Hashable
    draws: int
    of: Callable[[int, int], View]

    def batch(self, first: int, count: int, draw: int) -> View:
        """The view of images first .. first + count - 1."""
        name = (self.name, first, count, draw)
        return _VIEWS(name, lambda: stack([self.of(image, draw) for image in range(first, first + count)]))


@dataclass(frozen=True)
class Pass:
    """One pass over images `first` ..: `values` float64 (B, S) where `counted` (B, S), of the tokens at `positions`."""

    first: int
    draw: int
    values: np.ndarray
    counted: np.ndarray
    positions: np.ndarray

    @property
    def images(self) -> slice:
        return slice(self.first, self.first + len(self.values))


@torch.inference_mode()
def passes(
    subject: Subject,
    images: int,
    views: Views,
    measure: Measure,
    progress: Progress,
    name: str,
    stream: int = DRAWS,
) -> Iterator[Pass]:
    """Every batch of the first `images` in each of its views; `stream` is where the purposes of the noise generators
    begin."""
    for first in range(0, images, BATCH):
        count = min(BATCH, images - first)
        tokens, text = validation_batch(subject, first, count)
        for draw in range(views.draws):
            view = views.batch(first, count, draw)
            values = measure(tokens, text, view, generator(first, stream + draw))
            parts = (values.double().cpu(), view.counted.cpu(), view.positions.cpu())
            yield Pass(first, draw, *(part.numpy() for part in parts))
        progress(name, first + count, images)


def stack(views: list[View]) -> View:
    """Views of single images as one of a batch; where all stand alike, their positions are one expanded row."""
    reads, positions, counted = zip(*((v.reads, v.positions, v.counted) for v in views), strict=True)
    alike = all(torch.equal(one, positions[0]) for one in positions[1:])
    where = positions[0].expand(len(views), -1) if alike else torch.cat(positions)
    return View(torch.cat(reads), where, torch.cat(counted))


def validation_batch(subject: Subject, first: int, count: int) -> tuple[Tensor, Text]:
    """Tokens and text of validation images first .. first + count; continuous tokens are one fixed posterior draw."""
    encoded, text = subject.source.validation(first, count)
    name = (subject.spec.data, subject.tokenizer.sha256, str(subject.device), first, count)
    return _TOKENS(name, lambda: fixed_tokens(subject, encoded, first)), text.to(subject.device)


def fixed_tokens(subject: Subject, encoded: Tensor, first: int) -> Tensor:
    """Tokens of encoded images numbered from `first`; continuous ones are a posterior draw of each number's own."""
    parts = [subject.tokenizer.sample(encoded[k : k + 1], generator(first + k, -1)) for k in range(len(encoded))]
    return torch.cat(parts).to(subject.device)


def generator(index: int, stream: int) -> torch.Generator:
    """The generator of one image (or of the batch that it opens) and one purpose."""
    seed = np.random.SeedSequence([SEED, index, stream + 1]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def validation_protocol(name: str, subject: Subject, images: int, **facts: Any) -> str:
    """How a number on the validation images is measured; `facts` are what one evaluator adds."""
    spec = subject.spec
    encoded = spec.data.val_manifest_sha256 or spec.data.manifest_sha256
    return protocol_id(
        f"{name}-{spec.data.name}-n{images}",
        world=canonical(spec.data.world),
        **({"images": encoded} if encoded else {}),
        tokenizer=spec.tokenizer_sha256,
        order=[spec.model.order, spec.model.mask_law],
        head=canonical(spec.model.head.objective) if spec.model.head else None,
        drawn=[WORLD_VALIDATION, SEED, BATCH, DRAWS],
        **facts,
    )


def listed(values: np.ndarray) -> list[float | None]:
    """Values (n,) as JSON keeps them; 7 digits, as many as the float32 behind them carries."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values.tolist()]


class Breakdown:
    """Means of a number by an index (a position, a step): which part of an image is hard."""

    def __init__(self, size: int) -> None:
        self._moments = np.zeros((3, size))

    def add(self, index: np.ndarray, values: np.ndarray) -> None:
        """Counts values (n,) under index (n,)."""
        for row, weights in zip(self._moments, (np.ones(len(values)), values, values**2), strict=True):
            row += np.bincount(index, weights, minlength=len(row))

    def as_json(self) -> dict[str, list[float | None]]:
        """Per index: mean, its standard error (tokens taken as independent) and how many; None where none were."""
        n, total, square = self._moments
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / n
            se = np.sqrt(np.maximum(square / n - mean**2, 0.0) / (n - 1))
        columns = {"mean": mean, "se": se, "n": n}
        return {name: [v if math.isfinite(v) else None for v in column.tolist()] for name, column in columns.items()}
