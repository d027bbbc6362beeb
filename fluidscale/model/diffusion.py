"""Noise processes and training objectives of the denoising head, and its likelihood bound.

x_t = alpha x + sigma e with e ~ N(0, I). Three objectives, each a pair of process and prediction:

- `eps`: MAR exactly (arXiv 2406.11838): cosine betas, 1000 steps, the noise is predicted, with a learned variance.
- `v`: cosine variance-preserving, continuous time; v = alpha e - sigma x is predicted.
- `flow`: the straight path x_t = (1 - t) x + t e; the velocity e - x is predicted.

Tables and schedules are computed in float64 and rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fluidscale.model.draws import normal
from fluidscale.spec import TIME_STEPS

# Distinct noise levels in one training batch of a continuous-time objective. Each token's level still follows the
# law exactly; sharing levels saves most time embeddings, which are half of a small head's work.
LEVELS = 256
# Ends of the log-SNR integral of the likelihood bound. With unit-variance latents what lies outside is worth less
# than 1e-4 nats a channel, and MAR's finest noise level (10.1) is inside its own table.
LOG_SNR_ENDS = (-9.0, 9.0)

# A network: (x (M, R, C), times (K,), which (M, R)) -> outputs (M, R, C or 2 C), with z already bound.
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Noise:
    """What is random in a training loss of M tokens with R repeats each; a slice of rows is some of the tokens.

    Levels (K,) are the objective's own, `which` (M, R) says which of them each draw uses, `values` (M, R, C) is normal.
    """

    levels: Tensor
    which: Tensor
    values: Tensor

    def rows(self, part: slice) -> Noise:
        return Noise(self.levels, self.which[part], self.values[part])


@dataclass(frozen=True)
class Level:
    """Noise levels: the time that the network is told, and x_t = alpha x + sigma e. float64 of any one shape."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor


class Objective(Protocol):
    """What the network predicts, along which path, and how that is scored."""

    name: str  # of OBJECTIVES
    outputs_per_channel: int
    start: float  # native time, and log-SNR, from which a deterministic solver may start
    lowest_log_snr: float

    def at_log_snr(self, log_snr: Tensor) -> Level:
        """The levels with log(alpha^2 / sigma^2) as given, float64."""
        ...

    def at_time(self, u: Tensor) -> Level:
        """The levels at native times 0 (clean) .. 1 (noise), float64."""
        ...

    def to_clean(self, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
        """The clean token that a prediction stands for."""
        ...

    def to_noise(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise that a prediction stands for."""
        ...

    def draw(self, rows: int, channels: int, repeats: int, rng: torch.Generator, stratified: bool) -> Noise:
        """`repeats` levels and noises for each of `rows` tokens, on the generator's device."""
        ...

    def losses(self, network: Network, x: Tensor, noise: Noise) -> Tensor:
        """Training loss (M,) of tokens (M, C): mean over channels and over the repeats of level and noise."""
        ...


def spread(rows: int, levels: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`levels` stratified uniforms (K,) in (0, 1), float64, and which of them each row uses, (rows,).

    Rows are dealt the strata at random and evenly, so every row's level is uniform, and together they cover (0, 1).
    """
    jitter = torch.rand(levels, generator=rng, device=rng.device, dtype=torch.float64)
    u = (torch.arange(levels, device=rng.device) + jitter) / levels
    dealt = torch.randperm(rows, generator=rng, device=rng.device) * levels // rows
    # Where levels do not divide rows, some serve one row more: which ones is left to chance.
    return u, (dealt + torch.randint(levels, (1,), generator=rng, device=rng.device)) % levels


class _ContinuousTime:
    """What `v` and `flow` share: the target is linear in (x, e) and the time is a real number."""

    outputs_per_channel = 1
    start = 1.0
    # Where 12 steps on a 16-dimensional mixture with an exact denoiser come nearest to its samples.
    lowest_log_snr = -7.0

    def __init__(self, path: Callable[[Tensor], tuple[Tensor, Tensor]], law: Callable[[Tensor], Tensor]) -> None:
        self._path, self._law = path, law

    def at_time(self, u: Tensor) -> Level:
        return Level(u * TIME_STEPS, *self._path(u))

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def draw(self, rows: int, channels: int, repeats: int, rng: torch.Generator, stratified: bool) -> Noise:
        draws = rows * repeats
        u, which = spread(draws, draws if stratified else max(1, min(draws, LEVELS)), rng)
        return Noise(self._law(u), which.view(rows, repeats), normal((rows, repeats, channels), rng, rng.device))

    def losses(self, network: Network, x: Tensor, noise: Noise) -> Tensor:
        times, alpha, sigma, which = _placed(self.at_time(noise.levels), noise.which, x.device)
        clean, values = x.float()[:, None], noise.values.to(x.device, non_blocking=True)
        output = network(torch.addcmul(alpha * clean, sigma, values), times, which)
        return (output - self.target(clean, values, alpha, sigma)).square().mean((1, 2))


def _placed(level: Level, which: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times (K,), alpha and sigma (M, R, 1) and which (M, R) on the device; gathered where the draws were made."""
    scales = torch.stack([level.alpha, level.sigma], dim=-1).float()[which]
    alpha, sigma = scales.to(device, non_blocking=True).split(1, dim=-1)
    times = level.time.float().to(device, non_blocking=True)
    return times, alpha, sigma, which.to(device, non_blocking=True)


class Velocity(_ContinuousTime):
    """v-prediction on the cosine variance-preserving path (arXiv 2202.00512): alpha = cos(pi t / 2), t ~ U(0, 1)."""

    name = "v"

    def __init__(self) -> None:
        super().__init__(lambda t: (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)), lambda u: u)

    def at_log_snr(self, log_snr: Tensor) -> Level:
        return self.at_time(torch.atan(torch.exp(-log_snr / 2)) * 2 / math.pi)

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x

    def to_clean(self, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
        return alpha * x - sigma * output

    def to_noise(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma * x + alpha * output


class Flow(_ContinuousTime):
    """Flow matching on the straight path, t = sigmoid(N(0, 1)) (arXiv 2403.03206)."""

    name = "flow"

    def __init__(self) -> None:
        super().__init__(lambda t: (1 - t, t), lambda u: torch.sigmoid(torch.special.ndtri(u)))

    def at_log_snr(self, log_snr: Tensor) -> Level:
        return self.at_time(torch.sigmoid(-log_snr / 2))

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x

    def to_clean(self, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
        return x - sigma * output

    def to_noise(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x + alpha * output


@functools.cache
def cosine_betas() -> np.ndarray:
    """MAR's betas (1000,): 1 - abar(t + 1) / abar(t), at most .999, with abar = cos^2((t + .008) / 1.008 pi / 2)."""
    edges = np.arange(TIME_STEPS + 1) / TIME_STEPS
    alpha_bar = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


@dataclass(frozen=True)
class Posterior:
    """q(x_{t-1} | x_t, x) = N(clean x + noisy x_t, exp(log_min)) of a chain of betas; float64 arrays, one entry a step.

    The learned variance lies between exp(log_min) and exp(log_max) = beta. log_min of the first step, whose variance
    is zero, is the second's (MAR).
    """

    alpha_bar: np.ndarray
    clean: np.ndarray
    noisy: np.ndarray
    log_min: np.ndarray
    log_max: np.ndarray


def posterior(betas: np.ndarray) -> Posterior:
    """The posterior of a full or respaced chain."""
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - before) / (1 - alpha_bar)
    # A chain of one step has no second variance to borrow; its only step adds no noise.
    first = variance[1] if len(betas) > 1 else betas[0]
    return Posterior(
        alpha_bar,
        clean=betas * np.sqrt(before) / (1 - alpha_bar),
        noisy=(1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar),
        log_min=np.log(np.append(first, variance[1:])),
        log_max=np.log(betas),
    )


@functools.cache
def _eps_table(device: torch.device) -> Tensor:
    """(1000, 4) float32: sqrt(abar), sqrt(1 - abar), log_max - log_min, and the weight of a squared noise error."""
    chain = posterior(cosine_betas())
    # The means differ by clean * (sigma / alpha) * (predicted - true noise).
    weight = chain.clean**2 * (1 - chain.alpha_bar) / chain.alpha_bar / np.exp(chain.log_min)
    signal, noise = np.sqrt(chain.alpha_bar), np.sqrt(1 - chain.alpha_bar)
    columns = np.stack([signal, noise, chain.log_max - chain.log_min, weight], axis=1)
    return torch.from_numpy(columns).float().to(device)


class Epsilon:
    """MAR's loss exactly: squared noise error plus the variational bound (in bits) that trains the variance alone."""

    name = "eps"
    outputs_per_channel = 2
    # Below this the token is the predicted noise's error times 1 / alpha > 9: a solver is better off not asking.
    lowest_log_snr = -4.5

    def __init__(self) -> None:
        chain = posterior(cosine_betas())
        # log-SNR falls with time; a clean token (log-SNR infinite) stands at index -1.
        self._log_snr = np.log(chain.alpha_bar / (1 - chain.alpha_bar))
        self.start = (float(self._index(np.array(self.lowest_log_snr))) + 1) / TIME_STEPS

    def _index(self, log_snr: np.ndarray) -> np.ndarray:
        return np.interp(-log_snr, -self._log_snr, np.arange(TIME_STEPS))

    def at_log_snr(self, log_snr: Tensor) -> Level:
        time = torch.as_tensor(self._index(log_snr.cpu().numpy()), device=log_snr.device)
        return Level(time, torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt())

    def at_time(self, u: Tensor) -> Level:
        log_snr = np.interp(u.cpu().numpy() * TIME_STEPS - 1, np.arange(TIME_STEPS), self._log_snr)
        return self.at_log_snr(torch.as_tensor(log_snr, device=u.device))

    def to_clean(self, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
        return (x - sigma * output[..., : x.shape[-1]]) / alpha

    def to_noise(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output[..., : x.shape[-1]]

    def draw(self, rows: int, channels: int, repeats: int, rng: torch.Generator, stratified: bool) -> Noise:
        steps = self._draw_steps(rows * repeats, rng, stratified).view(rows, repeats)
        levels = torch.arange(TIME_STEPS, device=rng.device)
        return Noise(levels, steps, normal((rows, repeats, channels), rng, rng.device))

    def losses(self, network: Network, x: Tensor, noise: Noise) -> Tensor:
        t, values = (part.to(x.device, non_blocking=True) for part in (noise.which, noise.values))
        alpha, sigma, width, weight = _eps_table(x.device)[t].split(1, dim=-1)
        clean = x.float()[:, None]
        # Embed each row's step, or the 1000 there are if that is less.
        distinct = t.numel() > TIME_STEPS
        times = torch.arange(TIME_STEPS if distinct else t.numel(), device=x.device)
        which = t if distinct else times.view(t.shape)
        output = network(torch.addcmul(alpha * clean, sigma, values), times if distinct else t.flatten(), which)
        predicted, variance = output.chunk(2, dim=-1)
        error = predicted - values
        bound = _bound_bits(error.detach(), (variance + 1) / 2, width, weight)
        first = (noise.which.flatten() == 0).nonzero().squeeze(1).to(x.device)
        if len(first):
            bound = _with_decoder(bound, first, clean.expand_as(error), error.detach(), (variance + 1) / 2)
        return (error.square() + bound).mean((1, 2))

    @staticmethod
    def _draw_steps(rows: int, rng: torch.Generator, stratified: bool) -> Tensor:
        if not stratified:
            return torch.randint(0, TIME_STEPS, (rows,), generator=rng, device=rng.device)
        u, which = spread(rows, rows, rng)
        return (u[which] * TIME_STEPS).long().clamp(max=TIME_STEPS - 1)


def _bound_bits(error: Tensor, fraction: Tensor, width: Tensor, weight: Tensor) -> Tensor:
    # KL between two normals whose log variances differ by fraction * width and whose means differ by the error.
    gap = fraction * width
    return 0.5 / math.log(2) * (gap - 1 + torch.exp(-gap) * (1 + weight * error.square()))


def _with_decoder(bound: Tensor, first: Tensor, clean: Tensor, error: Tensor, fraction: Tensor) -> Tensor:
    """Rows at the first step score a discretised normal instead of a KL (MAR, which inherits 8-bit bins of 2/255)."""
    chain = posterior(cosine_betas())
    clean, error, fraction = (part.flatten(0, 1)[first] for part in (clean, error, fraction))
    log_min, log_max = float(chain.log_min[0]), float(chain.log_max[0])
    centred = error * math.sqrt((1 - chain.alpha_bar[0]) / chain.alpha_bar[0])
    per_std = torch.exp(-0.5 * (log_min + fraction * (log_max - log_min)))
    above, below = (_normal_cdf(per_std * (centred + edge)) for edge in (1 / 255, -1 / 255))
    # The outer bins reach to infinity; .999 and 1e-12 are the published code's guards.
    inside = torch.where(clean > 0.999, 1 - below, above - below)
    probability = torch.where(clean < -0.999, above, inside).clamp(min=1e-12)
    bits = -torch.log(probability) / math.log(2)
    return bound.flatten(0, 1).index_copy(0, first, bits).view(bound.shape)


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation of the published code, kept because its loss is reproduced exactly.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


OBJECTIVES: dict[str, Callable[[], Objective]] = {"eps": Epsilon, "v": Velocity, "flow": Flow}


def likelihood_bound(objective: Objective, network: Network, x: Tensor, repeats: int, rng: torch.Generator) -> Tensor:
    """Nats (M,): an upper bound on -log p(x) of tokens x (M, C), a density in the units of x.

    The continuous-time variational bound (arXiv 2107.00630): KL(q(x_T | x) || N(0, I)) at the lowest log-SNR, the
    reconstruction of x from the highest under N(x_t / alpha, sigma^2 / alpha^2), and half the integral of the squared
    noise error over log-SNR between them, from `repeats` draws a token, one in each part of the range.

    Only the difference from a unit normal's exact denoiser on the same noise is drawn; the normal's own integral is
    known. That leaves the expectation alone and takes most of the variance.
    """
    low, high = LOG_SNR_ENDS
    rows, channels = len(x) * repeats, x.shape[1]
    jitter = torch.rand(len(x), repeats, generator=rng, device=rng.device, dtype=torch.float64)
    deal = torch.rand(len(x), repeats, generator=rng, device=rng.device).argsort(0)
    part = torch.arange(repeats, device=rng.device)
    log_snr = (low + (high - low) * (part + (deal + jitter) / len(x)) / repeats).flatten()
    which = torch.arange(rows, device=rng.device).view(len(x), repeats)
    times, alpha, sigma, which = _placed(objective.at_log_snr(log_snr), which, x.device)
    noise, clean = normal((len(x), repeats, channels), rng, x.device), x.float()[:, None]
    noisy = torch.addcmul(alpha * clean, sigma, noise)
    predicted = objective.to_noise(noisy, network(noisy, times, which), alpha, sigma)
    # A unit normal's exact denoiser errs by a (a e - s x) with a^2 = sigmoid(log-SNR) = 1 - s^2.
    signal = torch.sigmoid(log_snr).float().view(len(x), repeats, 1).to(x.device)
    reference = signal.sqrt() * (signal.sqrt() * noise - (1 - signal).sqrt() * clean)
    gain = ((predicted - noise).square() - reference.square()).sum(2).mean(1)
    return 0.5 * (high - low) * gain + _unit_normal_bound(objective, x.float())


def _unit_normal_bound(objective: Objective, x: Tensor) -> Tensor:
    """The bound (M,) of a unit normal's exact denoiser, all three terms in closed form."""
    low, high = LOG_SNR_ENDS
    reached, rise = 1 / (1 + math.exp(-high)) - 1 / (1 + math.exp(-low)), math.log1p(math.exp(high))
    rise -= math.log1p(math.exp(low))
    channels, square = x.shape[1], x.square().sum(1)
    # Of the squared error a^2 (a^2 C + s^2 |x|^2): the integral of a^4 is rise - reached, of a^2 s^2 it is reached.
    integral = 0.5 * (channels * (rise - reached) + square * reached)
    end = objective.at_log_snr(torch.tensor(low, dtype=torch.float64, device="cpu"))
    kept, variance = float(end.alpha) ** 2, float(end.sigma) ** 2
    prior = 0.5 * (kept * square + channels * (variance - 1 - math.log(variance)))
    # E |x - x_t / alpha|^2 = C sigma^2 / alpha^2, so the reconstruction term is known without a draw.
    return integral + prior + 0.5 * channels * (math.log(2 * math.pi) - high + 1)
