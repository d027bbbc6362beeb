"""`val_loss`: what training minimises, on fixed images. It compares sizes of one arm; orders are `val_nll`'s."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluidscale.evaluate.protocol import Metric, Progress, Score, Subject, silent
from fluidscale.evaluate.validation import DRAWS, Breakdown, Views, generator, listed, passes, validation_protocol
from fluidscale.model.order import View
from fluidscale.model.transformer import Text
from fluidscale.spec import RunSpec


@dataclass(frozen=True)
class ValidationLoss:
    """The training objective, every counted token weighted alike as in training.

    `extra` has it by position and by image: values whose mean and standard error are the score's.
    """

    name: str = "val_loss"

    def wanted(self, spec: RunSpec) -> bool:
        return spec.evaluate.val_images > 0

    def protocol(self, subject: Subject) -> str:
        return validation_protocol(self.name, subject, subject.spec.evaluate.val_images)

    def drawings(self, subject: Subject) -> tuple[()]:
        return ()

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        order, length, n = subject.model.order, subject.spec.model.num_tokens, subject.spec.evaluate.val_images

        def measure(tokens: Tensor, text: Text, view: View, rng: torch.Generator) -> Tensor:
            return subject.model.losses(tokens, text, view, rng, stratified=True)[0]

        def view_of(image: int, draw: int) -> View:
            return order.training_view(1, length, generator(image, draw))

        views = Views(("training", order, length), 1 if order.causal else DRAWS, view_of)
        sums, counts, by_position = np.zeros(n), np.zeros(n), Breakdown(length)
        for part in passes(subject, n, views, measure, progress, self.name):
            sums[part.images] += part.values.sum(1)
            counts[part.images] += part.counted.sum(1)
            by_position.add(part.positions[part.counted], part.values[part.counted])
        value, se = ratio(sums, counts)
        shares = value + (sums - value * counts) * n / counts.sum()
        unit = "diffusion loss" if subject.spec.model.head else "nats/token"
        extra = {"by_position": by_position.as_json(), "per_image": listed(shares)}
        yield Score(Metric(self.name, unit, False), value, se, n, self.protocol(subject), extra)


def ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """sum(sums) / sum(counts) over images (n,) and its standard error, that of the residuals (linearisation)."""
    value = sums.sum() / counts.sum()
    residuals = sums - value * counts
    return float(value), float(math.sqrt(len(sums)) * residuals.std(ddof=1) / counts.sum())
