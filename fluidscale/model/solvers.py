"""Solvers that turn noise into tokens with a trained denoiser.

| solver | objective | temperature scales |
|---|---|---|
| `ddpm` | eps: MAR's respaced ancestral sampler, nothing clamped | the noise added at each step |
| `ddpm_clamped` | eps: the same with the predicted clean token clamped | the noise added at each step |
| `ddim` | eps (clamped), v | the initial noise |
| `dpmpp_2m` | eps (clamped), v, flow: DPM-Solver++(2M) (arXiv 2211.01095) in even log-SNR steps | the initial noise |
| `euler` | flow | the initial noise |

`ddpm` diverges on an undertrained head: alpha_bar of its first step is 2.4e-9, so that an error of the predicted noise
is multiplied by 2e4 in the predicted token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluidscale.model.diffusion import Epsilon, Level, Objective, cosine_betas, posterior
from fluidscale.spec import TIME_STEPS
from fluidscale.valid import check_solver

# Even log-SNR steps end here: all but .25 % of a unit-variance token is known, and its prediction stands for it.
LOG_SNR_STOP = 6.0
# z-scored latents beyond 5 standard deviations are errors of the network, not tokens.
CLAMP = 5.0

# A guided network bound to its tokens: (x (M, C), number of the denoising step) -> output (M, C or 2 C).
StepNetwork = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Solver:
    """A schedule fixed before sampling: the network's time at each step, and the loop over them."""

    times: Tensor  # float64 (n,)
    num_noises: int  # draws of (M, C) that `solve` takes: the initial noise, and the added ones
    solve: Callable[[StepNetwork, Tensor, float], Tensor]  # (network, noise (num_noises, M, C), temperature) -> (M, C)


def make_solver(name: str, objective: Objective, num_steps: int) -> Solver:
    """Raises InvalidInput for a solver that does not exist or does not fit the objective, or fewer than one step."""
    check_solver(name, objective.name, num_steps)
    return _BUILDERS[name](objective, num_steps)


def respaced(num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps kept of the 1000, ascending, and the betas of the chain over them (MAR, after improved DDPM)."""
    stride = (TIME_STEPS - 1) / max(num_steps - 1, 1)
    # Half-way cases go to the even number, as Python's round does in the published code.
    kept = np.array([round(stride * i) for i in range(num_steps)])
    alpha_bar = np.cumprod(1 - cosine_betas())[kept]
    return kept, 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def _ancestral(objective: Objective, num_steps: int, clamp: float) -> Solver:
    kept, betas = respaced(num_steps)
    chain = posterior(betas)
    points = np.stack([np.sqrt(chain.alpha_bar), np.sqrt(1 - chain.alpha_bar)], axis=1)[::-1].tolist()
    moments = np.stack([chain.clean, chain.noisy, chain.log_min, chain.log_max], axis=1)[::-1].tolist()

    def solve(network: StepNetwork, noise: Tensor, temperature: float) -> Tensor:
        x = noise[0]
        for step, (point, (from_clean, from_noisy, log_min, log_max)) in enumerate(zip(points, moments, strict=True)):
            output = network(x, step)
            mean = from_clean * _clean(objective, x, output, point, clamp) + from_noisy * x
            if step == num_steps - 1:
                return mean
            fraction = (output[..., x.shape[-1] :] + 1) / 2
            std = torch.exp(0.5 * (log_min + fraction * (log_max - log_min)))
            x = mean + std * noise[step + 1] * temperature
        raise AssertionError("unreachable: there is at least one step")

    return Solver(torch.from_numpy(kept[::-1].astype(np.float64)), num_steps, solve)


def _ddpm(objective: Objective, num_steps: int) -> Solver:
    return _ancestral(objective, num_steps, math.inf)


def _ddpm_clamped(objective: Objective, num_steps: int) -> Solver:
    return _ancestral(objective, num_steps, CLAMP)


def _ddim(objective: Objective, num_steps: int) -> Solver:
    """Even steps of native time. On the straight path this is Euler's method for the velocity."""
    u = objective.start * (1 - torch.arange(num_steps, dtype=torch.float64, device="cpu") / num_steps)
    level = objective.at_time(u)
    points = _points(level)
    clamp = _clamp(objective)

    def solve(network: StepNetwork, noise: Tensor, temperature: float) -> Tensor:
        x = noise[0] * (temperature * math.hypot(*points[0]))
        for step, (alpha, sigma) in enumerate(points[:-1]):
            clean = _clean(objective, x, network(x, step), (alpha, sigma), clamp)
            after, left = points[step + 1]
            x = (after - left / sigma * alpha) * clean + left / sigma * x
        return x

    return Solver(level.time, 1, solve)


def _dpmpp_2m(objective: Objective, num_steps: int) -> Solver:
    start = objective.lowest_log_snr
    log_snr = torch.linspace(start, LOG_SNR_STOP, num_steps, dtype=torch.float64, device="cpu")
    level = objective.at_log_snr(log_snr)
    points = _points(level)
    shrink = math.exp(-(LOG_SNR_STOP - start) / 2 / max(num_steps - 1, 1))
    clamp = _clamp(objective)

    def solve(network: StepNetwork, noise: Tensor, temperature: float) -> Tensor:
        x = noise[0] * (temperature * math.hypot(*points[0]))
        before = None
        for step, (alpha, sigma) in enumerate(points[:-1]):
            clean = _clean(objective, x, network(x, step), (alpha, sigma), clamp)
            if step == num_steps - 1:
                return clean
            after, left = points[step + 1]
            # Even steps: the second-order term extrapolates by half a step.
            direction = clean if before is None else 1.5 * clean - 0.5 * before
            x = left / sigma * x + after * (1 - shrink) * direction
            before = clean
        raise AssertionError("unreachable: there is at least one step")

    return Solver(level.time, 1, solve)


def _clean(objective: Objective, x: Tensor, output: Tensor, point: tuple[float, float], clamp: float) -> Tensor:
    clean = objective.to_clean(x, output, *point)
    return clean if math.isinf(clamp) else clean.clamp(-clamp, clamp)


def _points(level: Level) -> list[tuple[float, float]]:
    """(alpha, sigma) at each step, and at the clean end."""
    return [*zip(level.alpha.tolist(), level.sigma.tolist(), strict=True), (1.0, 0.0)]


def _clamp(objective: Objective) -> float:
    # Only the noise objective divides by alpha.
    return CLAMP if isinstance(objective, Epsilon) else math.inf


_BUILDERS: dict[str, Callable[[Objective, int], Solver]] = {
    "ddpm": _ddpm,
    "ddpm_clamped": _ddpm_clamped,
    "ddim": _ddim,
    "dpmpp_2m": _dpmpp_2m,
    "euler": _ddim,
}
