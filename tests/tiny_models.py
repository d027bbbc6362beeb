"""The four arms at a size that a test can afford, and batches for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from fluidscale.model.build import FluidModel, build
from fluidscale.model.transformer import Text
from fluidscale.spec import ARMS, POSITIONS, DiffusionSpec, ModelSpec, SamplingSpec

# Models this small are slower on two threads, far slower where others use the cores.
torch.set_num_threads(1)

CODES, CHANNELS, WORDS, TEXT_LENGTH = 24, 6, 12, 5
# The robust solver of each objective.
SOLVERS = {"eps": "ddpm_clamped", "v": "dpmpp_2m", "flow": "euler"}


def arm_spec(arm: str, position: str = "input", objective: str = "flow", grid: int = 3, mask_law: str = "cosine",
             repeats: int = 2) -> ModelSpec:  # fmt: skip
    kind, order = arm.split("-")
    continuous = kind == "continuous"
    return ModelSpec(
        token_kind=kind, order=order, depth=2, width=16, num_heads=2, grid=grid,
        token_channels=CHANNELS if continuous else 0, vocab_size=0 if continuous else CODES,
        text_vocab_size=WORDS, text_width=8, text_length=TEXT_LENGTH, aligner_depth=1, position=position,
        mask_law="none" if order == "raster" else mask_law,
        head=DiffusionSpec(width=12, num_blocks=2, objective=objective, noise_repeats=repeats) if continuous else None,
    )  # fmt: skip


def awake(spec: ModelSpec, seed: int = 0) -> FluidModel:
    """A model none of whose weights is zero: fresh AdaLN and output layers would hide most faults."""
    torch.manual_seed(seed)
    model = build(spec)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return model.eval()


def tokens_of(spec: ModelSpec, batch: int, seed: int = 2) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    if spec.token_kind == "discrete":
        return torch.randint(spec.vocab_size, (batch, spec.num_tokens), generator=rng)
    return torch.randn(batch, spec.num_tokens, spec.token_channels, generator=rng)


def text_of(spec: ModelSpec, batch: int, seed: int = 3) -> Text:
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(1, spec.text_vocab_size, (batch, spec.text_length), generator=rng)
    lengths = torch.randint(1, spec.text_length + 1, (batch, 1), generator=rng)
    mask = torch.arange(spec.text_length) < lengths
    return Text(words * mask, mask)


def sampling_of(spec: ModelSpec, num_steps: int = 4, guidance: float = 2.0, temperature: float = 1.0,
                schedule: str = "constant") -> SamplingSpec:  # fmt: skip
    if spec.head is None:
        return SamplingSpec(guidance, temperature, num_steps, schedule)
    return SamplingSpec(guidance, temperature, num_steps, schedule, 6, SOLVERS[spec.head.objective])


def with_encoder(spec: ModelSpec) -> tuple[ModelSpec, ...]:
    """A spec with MAR's encoder, with buffer tokens, and with both; raster order has neither."""
    if spec.order == "raster":
        return ()
    changes = ({"encoder_depth": 1}, {"buffer_tokens": 3}, {"encoder_depth": 1, "buffer_tokens": 3})
    return tuple(replace(spec, **change) for change in changes)


__all__ = ["ARMS", "POSITIONS", "SOLVERS", "arm_spec", "awake", "sampling_of", "text_of", "tokens_of",
           "with_encoder"]  # fmt: skip
