"""Validation loss and likelihood on fixed images, with everything random fixed too.

Masks, orders and noise depend on the image's index alone, never on the model, so the difference between two models is
free of their noise (common random numbers). The two quantities are never mixed:

- `val_loss` is what training minimises; it compares sizes of one arm.
- `val_nll` is nats per image; it compares orders for one tokenizer and one kind of head. A causal order is measured by
  the chain rule. Any other by L times the mean over unseen tokens, over uniformly many known tokens in random order:
  the mean negative log-likelihood over orders, which is an upper bound on that of their mixture and the likelihood of
  drawing one token a step. Continuous tokens have the head's variational bound, as a density of the z-scored latents
  (it may be negative); the constant log-determinant of that scaling is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluidscale.evaluate.protocol import Metric, Progress, Score, Subject, protocol_id, silent
from fluidscale.model.order import Order, View
from fluidscale.model.transformer import Text
from fluidscale.spec import EvaluateSpec, canonical

# Part of the protocol: noise is stratified over the tokens of one batch, so another size would be other noise.
_BATCH = 64
# Views per image where one view shows only part of the tokens' losses.
_DRAWS = 4
_SPLIT, _SEED = "seen", 20240


@dataclass(frozen=True)
class ValidationLoss:
    """`val_loss`: the training objective, every counted token weighted alike as in training."""

    name: str = "val_loss"

    def wanted(self, spec: EvaluateSpec) -> bool:
        return spec.val_images > 0

    def protocol(self, subject: Subject) -> str:
        return _protocol(self.name, subject)

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        def measure(tokens: Tensor, text: Text, view: View, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            losses, counted = subject.model.losses(tokens, text, view, rng, stratified=True)
            return losses.sum(1), counted.sum(1)

        def views(draw: int, first: int, count: int) -> View:
            order, length = subject.model.order, subject.spec.model.num_tokens
            return stack([order.training_view(1, length, _rng(first + k, draw)) for k in range(count)])

        sums, counts = _accumulate(subject, views, measure, progress, self.name)
        value, se = ratio(sums, counts)
        unit = "diffusion loss" if subject.spec.model.head else "nats/token"
        yield Score(Metric(self.name, unit, False), value, se, len(sums), self.protocol(subject))


@dataclass(frozen=True)
class ValidationLikelihood:
    """`val_nll`: nats per image."""

    name: str = "val_nll"

    def wanted(self, spec: EvaluateSpec) -> bool:
        return spec.val_images > 0

    def protocol(self, subject: Subject) -> str:
        return _protocol(self.name, subject)

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        length = subject.spec.model.num_tokens

        def measure(tokens: Tensor, text: Text, view: View, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            nats = subject.model.nll(tokens, text, view, rng)
            counted = view.counted.to(nats)
            return length * (nats * counted).sum(1) / counted.sum(1), torch.ones(len(nats))

        def views(draw: int, first: int, count: int) -> View:
            rngs = [_rng(first + k, draw) for k in range(count)]
            return stack([likelihood_view(subject.model.order, length, draw, rng) for rng in rngs])

        sums, counts = _accumulate(subject, views, measure, progress, self.name)
        per_image = sums / counts
        se = float(per_image.std(ddof=1)) / math.sqrt(len(per_image))
        metric = Metric(self.name, "nats/image", False)
        yield Score(metric, float(per_image.mean()), se, len(per_image), self.protocol(subject))


def ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """sum(sums) / sum(counts) over images (n,) and its standard error, that of the residuals (linearisation)."""
    value = sums.sum() / counts.sum()
    residuals = sums - value * counts
    return float(value), float(math.sqrt(len(sums)) * residuals.std(ddof=1) / counts.sum())


def likelihood_view(order: Order, length: int, draw: int, rng: torch.Generator) -> View:
    """What one image is asked: a causal order all its conditionals at once, another the unseen tokens after a prefix.

    Prefix lengths 0 .. length - 1 are uniform, one from each of _DRAWS equal strata as `draw` runs over them.
    """
    if order.causal:
        return order.training_view(1, length, rng)
    prefix = int(length * (draw + torch.rand((), generator=rng).item()) / _DRAWS)
    known = torch.zeros(1, length, dtype=torch.bool)
    known[0, torch.randperm(length, generator=rng)[:prefix]] = True
    return order.view(known)


def stack(views: list[View]) -> View:
    """Views of single images as one of a batch."""
    return View(*(torch.cat(parts) for parts in zip(*((v.reads, v.positions, v.counted) for v in views), strict=True)))


@torch.inference_mode()
def _accumulate(
    subject: Subject,
    views: Callable[[int, int, int], View],
    measure: Callable[[Tensor, Text, View, torch.Generator], tuple[Tensor, Tensor]],
    progress: Progress,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Per image the two sums of `measure` over all its views, in float64."""
    total = subject.spec.evaluate.val_images
    draws = 1 if subject.model.order.causal else _DRAWS
    sums, counts = np.zeros(total), np.zeros(total)
    for first in range(0, total, _BATCH):
        count = min(_BATCH, total - first)
        tokens, text = validation_batch(subject, first, count)
        for draw in range(draws):
            a, b = measure(tokens, text, views(draw, first, count), _rng(first, _DRAWS + draw))
            sums[first : first + count] += a.double().cpu().numpy()
            counts[first : first + count] += b.double().cpu().numpy()
        progress(name, first + count, total)
    return sums, counts


def validation_batch(subject: Subject, first: int, count: int) -> tuple[Tensor, Text]:
    """Tokens and text of validation images first .. first + count; continuous tokens are one fixed posterior draw."""
    images, words, _ = subject.world.scenes(first, count, _SPLIT)
    encoded = subject.tokenizer.encode(images)
    parts = [subject.tokenizer.sample(encoded[k : k + 1], _rng(first + k, -1)) for k in range(count)]
    words = torch.as_tensor(words).to(subject.device)
    return torch.cat(parts).to(subject.device), Text(words, words > 0)


def _rng(index: int, stream: int) -> torch.Generator:
    """The generator of one image (or of the batch that it opens) and one purpose."""
    seed = np.random.SeedSequence([_SEED, index, stream + 1]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def _protocol(name: str, subject: Subject) -> str:
    spec = subject.spec
    return protocol_id(
        f"{name}-{spec.data.name}-n{spec.evaluate.val_images}",
        world=canonical(spec.data.world),
        tokenizer=spec.tokenizer_sha256,
        order=[spec.model.order, spec.model.mask_law],
        head=canonical(spec.model.head.objective) if spec.model.head else None,
        drawn=[_SPLIT, _SEED, _BATCH, _DRAWS],
    )
