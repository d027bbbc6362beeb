"""Nats per image: what compares orders for one tokenizer and one kind of head.

- `val_nll`: a causal order by the chain rule. Any other by L times the mean over unseen tokens, over uniformly many
  known tokens in random order: the mean negative log-likelihood over orders, which is an upper bound on that of their
  mixture and the likelihood of drawing one token a step.
- `val_nll_raster_order`: the same network asked in raster order, one token a step.
- `val_nll_k_steps`: in its own sampling schedule, where the tokens of one step do not see each other.

The last two exist for orders that are not causal; their differences from the first separate what a model knows from
what its sampling loses. Continuous tokens have the head's variational bound, as a density of the z-scored latents (it
may be negative); `extra` states the log-determinant that leads to the tokenizer's own units, and the bound's ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluidscale.evaluate.protocol import Metric, Progress, Score, Subject, silent
from fluidscale.evaluate.validation import (
    BATCH,
    DRAWS,
    Breakdown,
    Views,
    generator,
    listed,
    passes,
    validation_batch,
    validation_protocol,
)
from fluidscale.model.diffusion import LOG_SNR_ENDS
from fluidscale.model.draws import normal
from fluidscale.model.head import DiffusionHead
from fluidscale.model.order import ORDERS, Order, View
from fluidscale.spec import RunSpec

# Steps of a schedule that one image is measured at: all of them up to this many, one of each stratum beyond.
STEPS = 16
# Images of the table over noise levels.
LEVEL_IMAGES = 256
# Purposes of generators, apart from those of the losses: orders and steps of an image, noise of a batch.
_ORDER, _PICK, _NOISE, _LEVELS = 100, 200, 300, 400
# Noise levels of the table: what lies outside is nearly certain or nearly unknown.
LOG_SNRS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class ValidationLikelihood:
    """`val_nll`; `extra` has nats per token by position and by how many tokens were known, and nats by image."""

    name: str = "val_nll"

    def wanted(self, spec: RunSpec) -> bool:
        return spec.evaluate.val_images > 0

    def protocol(self, subject: Subject) -> str:
        return validation_protocol(self.name, subject, subject.spec.evaluate.val_images)

    def drawings(self, subject: Subject) -> tuple[()]:
        return ()

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        order, length, n = subject.model.order, subject.spec.model.num_tokens, subject.spec.evaluate.val_images
        draws = 1 if order.causal else DRAWS

        def view_of(image: int, draw: int) -> View:
            return likelihood_view(order, length, draw, generator(image, draw))

        views = Views(("likelihood", order, length), draws, view_of)
        per_image, by_position, by_known = np.zeros(n), Breakdown(length), Breakdown(length)
        for part in passes(subject, n, views, subject.model.nll, progress, self.name):
            counts = part.counted.sum(1)
            per_image[part.images] += length * part.values.sum(1) / counts / draws
            values, positions = part.values[part.counted], part.positions[part.counted]
            known = positions if order.causal else np.repeat(length - counts, counts)
            by_position.add(positions, values)
            by_known.add(known, values)
        extra = {
            "by_position": by_position.as_json(),
            "by_known": by_known.as_json(),
            "per_image": listed(per_image),
            **continuous_facts(subject),
        }
        yield _score(self.name, per_image, self.protocol(subject), extra)


@dataclass(frozen=True)
class StepwiseLikelihood:
    """Nats per image along a fixed schedule of steps: the sum of the model's own conditionals.

    `schedule` gives, for one image, the positions (k,) written at each step. Up to STEPS steps the sum is exact;
    beyond, one step of each of STEPS strata stands for the others, which keeps it unbiased.
    """

    name: str
    schedule: Callable[[Subject, int], list[Tensor]]

    def wanted(self, spec: RunSpec) -> bool:
        asked = spec.evaluate.val_images > 0 and spec.evaluate.stepwise_images > 0
        return asked and not ORDERS[spec.model.order](spec.model.mask_law).causal

    def protocol(self, subject: Subject) -> str:
        steps = len(self.schedule(subject, 0))
        return validation_protocol(self.name, subject, self._images(subject), steps=[steps, STEPS])

    def drawings(self, subject: Subject) -> tuple[()]:
        return ()

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        n, length, steps = self._images(subject), subject.spec.model.num_tokens, len(self.schedule(subject, 0))
        order, picked = subject.model.order, min(STEPS, steps)

        def step_of(image: int, draw: int) -> int:
            within = torch.rand((), generator=generator(image, _PICK + draw)).item() if picked < steps else 0.0
            return int(steps * (draw + within) / picked)

        def view_of(image: int, draw: int) -> View:
            return step_view(order, self.schedule(subject, image), length, step_of(image, draw))

        views = Views((self, order, length, steps), picked, view_of)
        per_image, by_step = np.zeros(n), Breakdown(steps)
        for part in passes(subject, n, views, subject.model.nll, progress, self.name, _NOISE):
            per_image[part.images] += part.values.sum(1) * steps / picked
            rows = np.nonzero(part.counted)[0]
            by_step.add(np.array([step_of(part.first + k, part.draw) for k in rows]), part.values[part.counted])
        extra = {"steps": steps, "steps_measured": picked, "by_step": by_step.as_json()}
        yield _score(self.name, per_image, self.protocol(subject), extra)

    def _images(self, subject: Subject) -> int:
        return min(subject.spec.evaluate.stepwise_images, subject.spec.evaluate.val_images)


def raster_schedule(subject: Subject, image: int) -> list[Tensor]:
    """One token a step, in raster order."""
    return list(torch.arange(subject.spec.model.num_tokens)[:, None])


def own_schedule(subject: Subject, image: int) -> list[Tensor]:
    """As the run's images are drawn: its number of steps, in an order that depends on the image alone."""
    length, num_steps = subject.spec.model.num_tokens, subject.spec.evaluate.sampling.num_inference_steps
    permutation = torch.randperm(length, generator=generator(image, _ORDER))
    return [written[0] for written in subject.model.order.steps(length, num_steps, permutation[None])]


def likelihood_view(order: Order, length: int, draw: int, rng: torch.Generator) -> View:
    """What one image is asked: a causal order all its conditionals at once, another the unseen tokens after a prefix.

    Prefix lengths 0 .. length - 1 are uniform, one from each of DRAWS equal strata as `draw` runs over them.
    """
    if order.causal:
        return order.training_view(1, length, rng)
    prefix = int(length * (draw + torch.rand((), generator=rng).item()) / DRAWS)
    known = torch.zeros(1, length, dtype=torch.bool)
    known[0, torch.randperm(length, generator=rng)[:prefix]] = True
    return order.view(known)


def step_view(order: Order, schedule: list[Tensor], length: int, step: int) -> View:
    """What one image is asked at one step: the tokens written there, from those of the steps before."""
    known, written = torch.zeros(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.bool)
    for before in schedule[:step]:
        known[0, before] = True
    written[0, schedule[step]] = True
    view = order.view(known)
    return View(view.reads, view.positions, view.counted & written.gather(1, view.positions))


def continuous_facts(subject: Subject) -> dict[str, Any]:
    """What a bound in nats of latents must state, and the error at each noise level; empty for codes."""
    if subject.spec.model.head is None:
        return {}
    log_scale = getattr(subject.tokenizer, "log_scale", None)
    return {
        "density_of": "z-scored latents; add log_det_scaling for the tokenizer's own",
        "log_det_scaling": None if log_scale is None else subject.spec.model.num_tokens * log_scale,
        "log_snr_ends": list(LOG_SNR_ENDS),
        "reconstruction": "N(x_t / alpha, sigma^2 / alpha^2) at the highest log-SNR",
        "by_log_snr": noise_errors(subject),
    }


@torch.inference_mode()
def noise_errors(subject: Subject) -> dict[str, Any]:
    """The mean squared error of the predicted noise, per channel, at each of LOG_SNRS: which noise levels fail.

    A denoiser that knew nothing but unit variance would err by sigmoid(log-SNR), which `unit_normal` repeats.
    """
    model, length = subject.model, subject.spec.model.num_tokens
    head, n = model.head, min(LEVEL_IMAGES, subject.spec.evaluate.val_images)
    assert isinstance(head, DiffusionHead)

    def view_of(image: int, _: int) -> View:
        return likelihood_view(model.order, length, image % DRAWS, generator(image, _LEVELS))

    views, table = Views(("levels", model.order, length), 1, view_of), Breakdown(len(LOG_SNRS))
    for first in range(0, n, BATCH):
        images = range(first, min(first + BATCH, n))
        tokens, text = validation_batch(subject, first, len(images))
        view = views.batch(first, len(images), 0)
        z = model(view, tokens, text)[view.counted]
        clean = tokens.float()[torch.arange(len(images))[:, None], view.positions][view.counted][:, None]
        for index, log_snr in enumerate(LOG_SNRS):
            level = head.objective.at_log_snr(torch.tensor([log_snr], dtype=torch.float64))
            time, alpha, sigma = (part.float().to(z.device) for part in (level.time, level.alpha, level.sigma))
            noise = normal(tuple(clean.shape), generator(first, _LEVELS + 1 + index), z.device)
            noisy = alpha * clean + sigma * noise
            which = torch.zeros(clean.shape[:2], dtype=torch.long, device=z.device)
            error = head.objective.to_noise(noisy, head.denoiser(noisy, time, which, z=z), alpha, sigma) - noise
            table.add(np.full(len(z), index), error.square().mean((1, 2)).double().cpu().numpy())
    return {"log_snr": list(LOG_SNRS), "unit_normal": [1 / (1 + math.exp(-s)) for s in LOG_SNRS], **table.as_json()}


def _score(name: str, per_image: np.ndarray, protocol: str, extra: dict[str, Any]) -> Score:
    n = len(per_image)
    se = float(per_image.std(ddof=1)) / math.sqrt(n)
    return Score(Metric(name, "nats/image", False), float(per_image.mean()), se, n, protocol, extra)
