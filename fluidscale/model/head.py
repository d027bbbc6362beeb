"""The token axis: a head owns both ends of a token, how it is read and how it is predicted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluidscale.model.denoiser import Denoiser, step_chunks
from fluidscale.model.diffusion import OBJECTIVES, Noise, likelihood_bound
from fluidscale.model.draws import ImageDraws
from fluidscale.model.solvers import Solver, StepNetwork, make_solver
from fluidscale.model.transformer import EMBED_STD, linear, zero_
from fluidscale.spec import ModelSpec, SamplingSpec
from fluidscale.valid import check_sampling

# Draws a token takes in the likelihood bound; more buy little, since a validation set has thousands of tokens.
BOUND_DRAWS = 4

# A scale for all rows, or (M, 1) of each row's own.
Guidance = float | Tensor


class Sampler(Protocol):
    """Draws tokens with settings that were fixed before."""

    def __call__(
        self, z: Tensor, z_uncond: Tensor | None, guidance: Guidance, draws: ImageDraws, known: float = 0.0
    ) -> Tensor:
        """Tokens (M,) int64 or (M, C) given z (M, d), when this share of the image's tokens is known."""
        ...


class Head(Protocol):
    """Reads tokens into the trunk and predicts them from z; rows are independent of each other."""

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L, d) from int64 (B, L) or float (B, L, C)."""
        ...

    def blank(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Tokens that are still to be written: zeros of the right shape and type."""
        ...

    def draw(self, rows: int, rng: torch.Generator, stratified: bool = False) -> Noise | None:
        """What is random in the loss of `rows` tokens; None if nothing is.

        `stratified` spreads noise levels over all rows, which takes their chance out of a comparison.
        """
        ...

    def losses(self, z: Tensor, tokens: Tensor, noise: Noise | None) -> Tensor:
        """The training loss (M,) of tokens (M,) or (M, C) given z (M, d) and what `draw` gave for these rows."""
        ...

    def nll(self, z: Tensor, tokens: Tensor, rng: torch.Generator) -> Tensor:
        """Nats per token (M,): exact for codes, an upper bound for continuous tokens."""
        ...

    def sampler(self, sampling: SamplingSpec) -> Sampler:
        """Fixes schedules once for all autoregressive steps. Raises InvalidInput for settings that do not fit."""
        ...


def guide(conditional: Tensor, unconditional: Tensor, scale: Guidance) -> Tensor:
    """u + s (c - u)."""
    return torch.lerp(unconditional, conditional, scale)


class SoftmaxHead(nn.Module):
    """Codes: an embedding in, a linear classifier out."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.codes = nn.Embedding(spec.vocab_size, spec.width)
        nn.init.normal_(self.codes.weight, std=EMBED_STD)
        self.classifier = zero_(nn.Linear(spec.width, spec.vocab_size))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.codes(tokens)

    def blank(self, batch: int, length: int, device: torch.device) -> Tensor:
        return torch.zeros(batch, length, dtype=torch.long, device=device)

    def draw(self, rows: int, rng: torch.Generator, stratified: bool = False) -> None:
        return None

    def losses(self, z: Tensor, tokens: Tensor, noise: Noise | None) -> Tensor:
        return F.cross_entropy(self.classifier(z).float(), tokens.long(), reduction="none")

    def nll(self, z: Tensor, tokens: Tensor, rng: torch.Generator) -> Tensor:
        return self.losses(z, tokens, None)

    def sampler(self, sampling: SamplingSpec) -> Sampler:
        check_sampling(sampling, None)
        temperature = sampling.temperature

        def sample(
            z: Tensor, z_uncond: Tensor | None, guidance: Guidance, draws: ImageDraws, known: float = 0.0
        ) -> Tensor:
            if z_uncond is None:
                logits = self.classifier(z).float()
            else:
                conditional, unconditional = self.classifier(torch.cat([z, z_uncond])).float().chunk(2)
                logits = guide(conditional, unconditional, guidance)
            if temperature == 0:
                return logits.argmax(-1)
            cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(-1)
            # One uniform a token; scaled by the total, so that rounding of the sum leaves no gap at the end.
            threshold = draws.uniform()[:, None] * cumulative[:, -1:]
            return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

        return sample


class DiffusionHead(nn.Module):
    """Continuous tokens: a linear map in, MAR's denoising MLP out."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.head is not None
        self.channels, self.repeats = spec.token_channels, spec.head.noise_repeats
        self.objective = OBJECTIVES[spec.head.objective]()
        outputs = self.objective.outputs_per_channel * spec.token_channels
        self.inward = linear(spec.token_channels, spec.width)
        self.denoiser = Denoiser(spec.token_channels, outputs, spec.width, spec.head.width, spec.head.num_blocks)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.inward(tokens.to(self.inward.weight.dtype))

    def blank(self, batch: int, length: int, device: torch.device) -> Tensor:
        return torch.zeros(batch, length, self.channels, device=device)

    def draw(self, rows: int, rng: torch.Generator, stratified: bool = False) -> Noise:
        return self.objective.draw(rows, self.channels, self.repeats, rng, stratified)

    def losses(self, z: Tensor, tokens: Tensor, noise: Noise | None) -> Tensor:
        assert noise is not None
        return self.objective.losses(partial(self.denoiser, z=z), tokens, noise)

    def nll(self, z: Tensor, tokens: Tensor, rng: torch.Generator) -> Tensor:
        return likelihood_bound(self.objective, partial(self.denoiser, z=z), tokens, BOUND_DRAWS, rng)

    def sampler(self, sampling: SamplingSpec) -> Sampler:
        check_sampling(sampling, self.objective.name)
        temperature = sampling.temperature
        most, fewest = sampling.num_denoising_steps, sampling.final_denoising_steps or sampling.num_denoising_steps

        @functools.cache
        def scheduled(steps: int) -> tuple[Solver, Tensor]:
            solver = make_solver(sampling.solver, self.objective, steps)
            return solver, self.denoiser.embed_time(solver.times.float().to(self.inward.weight.device))

        def sample(
            z: Tensor, z_uncond: Tensor | None, guidance: Guidance, draws: ImageDraws, known: float = 0.0
        ) -> Tensor:
            # DiSA (arXiv 2505.20297): the more is known, the narrower is what is left to denoise.
            solver, times = scheduled(round(most + (fewest - most) * known))
            network = self._bind(z, z_uncond, guidance, times)
            return solver.solve(network, draws.normal(solver.num_noises, self.channels), temperature)

        return sample

    def _bind(self, z: Tensor, z_uncond: Tensor | None, guidance: Guidance, times: Tensor) -> StepNetwork:
        """The guided network of these tokens: z projected once, AdaLN rows computed for many steps at a time."""
        condition = self.denoiser.condition(z if z_uncond is None else torch.cat([z, z_uncond]))
        per_step = len(condition) * self.denoiser.adaln.out_features
        chunks = {chunk.start: chunk for chunk in step_chunks(len(times), per_step)}
        rows: list[Tensor] = []

        def network(x: Tensor, step: int) -> Tensor:
            if step in chunks:
                later = times[chunks[step].start : chunks[step].stop, None]
                rows[:] = reversed(self.denoiser.modulate(condition + later).unbind())
            modulation = rows.pop()
            if z_uncond is None:
                return self.denoiser.denoise(x, modulation)
            # Both branches denoise the same tokens; the learned variance is the conditional one's (MAR).
            cond, uncond = self.denoiser.denoise(torch.cat([x, x]), modulation).chunk(2)
            guided = guide(cond[:, : self.channels], uncond[:, : self.channels], guidance)
            rest = cond[:, self.channels :]
            return torch.cat([guided, rest], dim=-1) if rest.shape[1] else guided

        return network


# One entry a head, by ModelSpec.token_kind.
HEADS: dict[str, Callable[[ModelSpec], SoftmaxHead | DiffusionHead]] = {
    "discrete": SoftmaxHead,
    "continuous": DiffusionHead,
}
