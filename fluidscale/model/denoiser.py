"""The denoising MLP of MAR (arXiv 2406.11838): residual AdaLN blocks conditioned on z and on the noise level."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluidscale.model.transformer import NORM_EPS, linear, zero_

# MAR: 256 sinusoids with periods up to 10000 steps.
FREQUENCIES = 256
MAX_PERIOD = 10000.0


@functools.cache
def _frequencies(device: torch.device) -> Tensor:
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float64, device="cpu")
    return torch.exp(-math.log(MAX_PERIOD) * steps / half).float().to(device)


@functools.cache
def _unit_scales(num_blocks: int, width: int, device: torch.device) -> Tensor:
    """1 in the columns of AdaLN's scales, 0 in those of shifts and gates."""
    rows = torch.zeros(3 * num_blocks + 2, width, device="cpu")
    rows[1::3] = 1
    return rows.flatten().to(device)


class DenoiserBlock(nn.Module):
    """x + gate * MLP(LN(x) * scale + shift), the scale being 1 + a learned one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(linear(width, width), nn.SiLU(), linear(width, width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.norm(x), scale)))


class Denoiser(nn.Module):
    """Noisy tokens, noise levels and z in; the objective's prediction out.

    `condition`, `modulate` and `denoise` are its three stages, so that sampling runs the first two once per token and
    not once per denoising step. The AdaLN rows of all blocks come from one matrix: one product instead of one a block.
    """

    def __init__(self, channels: int, outputs: int, z_width: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.condition = linear(z_width, width)
        self.input = linear(channels, width)
        self.blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(num_blocks))
        self.adaln = zero_(nn.Linear(width, (3 * num_blocks + 2) * width))
        self.output = zero_(nn.Linear(width, outputs))

    def embed_time(self, times: Tensor) -> Tensor:
        """(K, width) for K noise levels in steps of 0..1000, fractions allowed."""
        angles = times.float()[:, None] * _frequencies(times.device)
        return self.time(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))

    def modulate(self, y: Tensor) -> Tensor:
        """The AdaLN rows (..., (3 blocks + 2) width) of a condition plus a time embedding (..., width)."""
        # The 1 of every 1 + scale goes into the bias: once a column, not once an element.
        bias = self.adaln.bias + _unit_scales(len(self.blocks), self.width, y.device)
        return F.linear(F.silu(y), self.adaln.weight, bias)

    def denoise(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The prediction (..., outputs), float32, for noisy tokens (..., channels)."""
        rows = modulation.split(self.width, dim=-1)
        x = self.input(x)
        for i, block in enumerate(self.blocks):
            x = block(x, *rows[3 * i : 3 * i + 3])
        shift, scale = rows[-2:]
        x = torch.addcmul(shift, F.layer_norm(x, (self.width,), eps=NORM_EPS), scale)
        return self.output(x).float()

    def forward(self, x: Tensor, times: Tensor, which: Tensor, z: Tensor) -> Tensor:
        """Predictions (M, R, outputs) for x (M, R, channels) at levels times[which], which (M, R), given z (M, d).

        z is projected once and not once per repeat; equal noise levels are embedded once.
        """
        y = self.condition(z)[:, None] + F.embedding(which, self.embed_time(times))
        return self.denoise(x, self.modulate(y))


def step_chunks(num_steps: int, floats_per_step: int, budget: int = 1 << 24) -> list[range]:
    """Denoising steps whose AdaLN rows are computed together: as many as fit into `budget` floats (64 MiB)."""
    size = max(1, min(num_steps, budget // max(floats_per_step, 1)))
    edges = [*range(0, num_steps, size), num_steps]
    return [range(a, b) for a, b in pairwise(edges)]
