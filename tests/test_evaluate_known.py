"""Likelihoods of pictures whose distribution is known: the bound's analytic value, and no model below the entropy."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fluidscale.data.sources import WorldSource
from fluidscale.evaluate.likelihood import StepwiseLikelihood, ValidationLikelihood, own_schedule, raster_schedule
from fluidscale.evaluate.protocol import Subject
from fluidscale.evaluate.validation import validation_batch
from fluidscale.model.build import build
from fluidscale.model.transformer import Text
from fluidscale.spec import DiffusionSpec, ModelSpec


class Known:
    """Pictures of 2 x 2 pixels whose four values are a stationary Markov chain in raster order; no words, no loss.

    Stands for world and tokenizer at once. `codes` > 0: a chain that stays with probability .7, else moves to any other
    state; 0: a Gaussian one with correlation .8.
    """

    stay, correlation = 0.7, 0.8

    def __init__(self, codes: int) -> None:
        self.codes = codes
        self.spec, self.sha256 = None, object()  # no other world is this one

    @property
    def entropy(self) -> float:
        if not self.codes:
            return 2 * math.log(2 * math.pi * math.e) + 1.5 * math.log(1 - self.correlation**2)
        move = (1 - self.stay) / (self.codes - 1)
        step = -self.stay * math.log(self.stay) - (self.codes - 1) * move * math.log(move)
        return math.log(self.codes) + 3 * step

    def draw(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        chain = [rng.normal(size=count) if not self.codes else rng.integers(self.codes, size=count)]
        for _ in range(3):
            if self.codes:
                moved = (chain[-1] + rng.integers(1, self.codes, size=count)) % self.codes
                chain.append(np.where(rng.random(count) < self.stay, chain[-1], moved))
            else:
                noise = math.sqrt(1 - self.correlation**2) * rng.normal(size=count)
                chain.append(self.correlation * chain[-1] + noise)
        tokens = torch.from_numpy(np.stack(chain, 1))
        return tokens if self.codes else tokens.float()[..., None]

    def scenes(self, start: int, count: int, split: str):
        return self.draw(np.random.default_rng(start), count), np.ones((count, 1), np.int64), None

    def encode(self, images):
        return images

    def sample(self, moments, rng):
        return moments


def known_model(order: str, codes: int) -> ModelSpec:
    """A model for the pictures of `Known`."""
    return ModelSpec(
        token_kind="discrete" if codes else "continuous",
        order=order,
        depth=1,
        width=32,
        num_heads=2,
        grid=2,
        token_channels=0 if codes else 1,
        vocab_size=codes,
        text_vocab_size=2,
        text_width=8,
        text_length=1,
        aligner_depth=0,
        mask_law="uniform" if order == "random" else "none",
        head=None if codes else DiffusionSpec(32, 1, "v", 2),
    )


class ExactDenoiser(torch.nn.Module):
    """The best possible network for tokens that are N(mean, std^2), whatever z says."""

    def __init__(self, objective, mean: float, std: float) -> None:
        super().__init__()
        self.objective, self.mean, self.std = objective, mean, std

    def forward(self, x, times, which, z):
        name = type(self.objective).__name__
        t = times.double()
        if name == "Epsilon":
            steps = np.interp(t.numpy(), np.arange(1000), self.objective._log_snr)
            log_snr = torch.from_numpy(steps)
            alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        elif name == "Velocity":
            alpha, sigma = torch.cos(t / 1000 * math.pi / 2), torch.sin(t / 1000 * math.pi / 2)
        else:
            alpha, sigma = 1 - t / 1000, t / 1000
        alpha, sigma = (part.to(x)[which][..., None] for part in (alpha, sigma))
        shrunk = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        noise, clean = sigma * shrunk, self.mean + alpha * self.std**2 * shrunk
        if name == "Epsilon":
            return torch.cat([noise, torch.zeros_like(noise)], -1)
        return alpha * noise - sigma * clean if name == "Velocity" else noise - clean


class Independent(Known):
    """Four independent normals."""

    mean, std = 0.3, 0.6

    def draw(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        return torch.from_numpy(self.mean + self.std * rng.normal(size=(count, 4, 1))).float()


@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
def test_with_an_exact_denoiser_the_bound_is_the_analytic_value(tiny_spec, tmp_path, order, objective):
    spec = tiny_spec(f"continuous-{order}")
    model_spec = dataclasses.replace(known_model(order, 0), head=DiffusionSpec(8, 1, objective, 2))
    truth, network = Independent(0), build(model_spec).eval()
    network.head.denoiser = ExactDenoiser(network.head.objective, truth.mean, truth.std)
    evaluate = dataclasses.replace(spec.evaluate, val_images=512)
    spec = dataclasses.replace(spec, model=model_spec, evaluate=evaluate)
    subject = Subject(network, spec, WorldSource(spec, truth, truth, tmp_path), tmp_path, torch.device("cpu"))
    (score,) = ValidationLikelihood()(subject)
    values = torch.cat([validation_batch(subject, first, 64)[0] for first in range(0, 512, 64)])
    exact = 0.5 * ((values - truth.mean) ** 2 / truth.std**2 + math.log(2 * math.pi * truth.std**2))
    # Of these very images, so that what is left is the estimator's own error and not that of the draw of images.
    assert abs(score.value - exact.sum((1, 2)).mean().item()) < 3 * score.se
    entropy = 2 * math.log(2 * math.pi * math.e * truth.std**2)
    assert abs(score.value - entropy) < 3 * score.se
    noise = score.extra["by_log_snr"]
    for log_snr, error, se in zip(noise["log_snr"], noise["mean"], noise["se"], strict=True):
        ratio = math.exp(log_snr) * truth.std**2
        assert abs(error - ratio / (1 + ratio)) < 4 * se + 1e-4


# Fitted for seconds only: what is asked is a bound from below, and that the fit comes near it.
@pytest.mark.parametrize(
    ("order", "codes", "slack"), [("raster", 4, 0.05), ("random", 4, 0.15), ("raster", 0, 0.6), ("random", 0, 0.9)]
)
def test_a_fitted_model_stays_above_the_entropy_and_comes_near(tiny_spec, tmp_path, order, codes, slack):
    torch.manual_seed(0)
    model_spec = known_model(order, codes)
    truth, network, rng = Known(codes), build(model_spec), np.random.default_rng(7)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    torch_rng, steps = torch.Generator().manual_seed(0), 300
    for step in range(steps):
        tokens = truth.draw(rng, 128)
        text = Text(torch.ones(128, 1, dtype=torch.long), torch.ones(128, 1, dtype=torch.bool))
        view = network.order.training_view(128, 4, torch_rng)
        losses, counted = network.losses(tokens, text, view, torch_rng)
        optimizer.zero_grad()
        (losses.sum() / counted.sum()).backward()
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, 2 - 2 * step / steps)
        optimizer.step()
    spec = tiny_spec(f"{model_spec.token_kind}-{order}")
    sampling = dataclasses.replace(spec.evaluate.sampling, num_inference_steps=2)
    evaluate = dataclasses.replace(spec.evaluate, val_images=1024, sampling=sampling)
    spec = dataclasses.replace(spec, model=model_spec, evaluate=evaluate)
    source = WorldSource(spec, truth, truth, tmp_path)
    subject = Subject(network.eval(), spec, source, tmp_path, torch.device("cpu"))
    (score,) = ValidationLikelihood()(subject)
    assert truth.entropy - 3 * score.se < score.value < truth.entropy + slack + 3 * score.se
    schedules = {"val_nll_raster_order": raster_schedule, "val_nll_k_steps": own_schedule}
    for name, schedule in schedules.items() if order == "random" else ():
        (stepwise,) = StepwiseLikelihood(name, schedule)(subject)
        assert stepwise.value > truth.entropy - 3 * stepwise.se
