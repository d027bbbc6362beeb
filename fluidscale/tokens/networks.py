"""The in-project tokenizers' networks: one convolutional autoencoder, with a Gaussian or a vector-quantised bottleneck.

Both bottlenecks stand on the same encoder and decoder shape, so that the kind of token is the only thing that differs
between the continuous and the discrete arm. No normalisation layers: at these sizes they cost quality and gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Three halvings: the stem's space-to-depth and two strided convolutions.
FACTOR = 8
# Weight of the pull of the encoder towards its code; VQ-VAE, arXiv 1711.00937, section 3.2.
COMMITMENT = 0.25


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))): a 3x3 (dilated at will) for context, then a convolution of side `kernel`."""

    def __init__(self, channels: int, kernel: int = 3, dilation: int = 1) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        # Half a step at first: starting from none (zeros) cost 1.3 dB after 35 s of training.
        self.out.weight.data *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.silu(self.mix(F.silu(x))))


def encoder(widths: Sequence[int], channels: int) -> nn.Sequential:
    """(B, 3, R, R) -> (B, channels, R / 8, R / 8); `widths` are the channels at R/2, R/4 and R/8."""
    fine, middle, coarse = widths
    return nn.Sequential(
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, fine, 3, padding=1),
        ResidualBlock(fine),
        nn.Conv2d(fine, middle, 2, stride=2),
        ResidualBlock(middle),
        nn.Conv2d(middle, coarse, 2, stride=2),
        ResidualBlock(coarse),
        nn.SiLU(),
        nn.Conv2d(coarse, channels, 1),
    )


def decoder(widths: Sequence[int], channels: int) -> nn.Sequential:
    """(B, channels, G, G) -> (B, 3, 8 G, 8 G); the mirror of `encoder`."""
    fine, middle, coarse = widths
    return nn.Sequential(
        nn.Conv2d(channels, coarse, 1),
        ResidualBlock(coarse),
        nn.Conv2d(coarse, 4 * middle, 1),
        nn.PixelShuffle(2),
        ResidualBlock(middle),
        nn.Conv2d(middle, 4 * fine, 1),
        nn.PixelShuffle(2),
        ResidualBlock(fine),
        nn.Conv2d(fine, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )


class KLAutoencoder(nn.Module):
    """A diagonal Gaussian per token, as in latent diffusion's autoencoder (arXiv 2112.10752); KL averaged per latent.

    `shift` and `scale` (C,) z-score the latents per channel; they are measured after training over posterior draws.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int], channels: int, kl_weight: float) -> None:
        super().__init__()
        self.encoder = encoder(widths, 2 * channels)
        self.decoder = decoder(widths, channels)
        self.kl_weight = kl_weight
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (B, C, G, G), before z-scoring; log-deviations are kept within [-8, 2]."""
        mean, log_std = self.encoder(pixels).chunk(2, dim=1)
        return mean, log_std.clamp(-8.0, 2.0).exp()

    def loss(self, pixels: Tensor) -> Tensor:
        """Reconstruction + weighted KL, a scalar; pixels (B, 3, R, R) in [-1, 1]."""
        mean, std = self.moments(pixels)
        pixels_hat = self.decoder(mean + std * torch.randn_like(std))
        kl = 0.5 * (mean**2 + std**2 - 1.0 - 2.0 * std.log()).mean()
        return reconstruction_loss(pixels_hat, pixels) + self.kl_weight * kl

    @torch.no_grad()
    def measure_scaling(self, pixels: Tensor) -> None:
        """Sets shift and scale so that z-scored draws have mean 0 and variance 1 per channel over these pixels."""
        mean, std = self.moments(pixels)
        self.shift.copy_(mean.mean(dim=(0, 2, 3)))
        variance = ((mean - self.shift[:, None, None]) ** 2 + std**2).mean(dim=(0, 2, 3))
        self.scale.copy_(variance.sqrt())


class VQAutoencoder(nn.Module):
    """Nearest-neighbour codes with an exponentially averaged codebook (arXiv 1711.00937, appendix A.1).

    The first `warmup` training calls run without quantisation; then the codebook is filled with latents as they are, so
    that every code starts where data lie. A code that falls out of use is moved onto a latent of the current batch.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self, widths: Sequence[int], channels: int, vocab_size: int, warmup: int = 0, decay: float = 0.99
    ) -> None:
        super().__init__()
        self.encoder = encoder(widths, channels)
        self.decoder = decoder(widths, channels)
        self.warmup, self.decay, self.calls = warmup, decay, 0
        self.register_buffer("codebook", torch.randn(vocab_size, channels))
        self.register_buffer("counts", torch.ones(vocab_size), persistent=False)
        self.register_buffer("sums", torch.zeros(vocab_size, channels), persistent=False)
        self._recent: list[Tensor] = []

    def codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) index of the nearest code."""
        return (self.codebook.square().sum(1) - 2.0 * latents @ self.codebook.T).argmin(dim=1)

    def loss(self, pixels: Tensor) -> Tensor:
        """Reconstruction + commitment, a scalar; updates the codebook. pixels (B, 3, R, R) in [-1, 1]."""
        latents = self.encoder(pixels)
        self.calls += 1
        if self.calls <= self.warmup:
            self._collect(latents)
            return reconstruction_loss(self.decoder(latents), pixels)
        flat = latents.movedim(1, -1).reshape(-1, latents.shape[1])
        codes = self.codes(flat.detach())
        quantised = self.codebook[codes].view_as(latents.movedim(1, -1)).movedim(-1, 1)
        self._follow(flat.detach(), codes)
        straight_through = latents + (quantised - latents).detach()
        commitment = F.mse_loss(latents, quantised)
        return reconstruction_loss(self.decoder(straight_through), pixels) + COMMITMENT * commitment

    @torch.no_grad()
    def _collect(self, latents: Tensor) -> None:
        """Keeps the last latents of the warm-up; at its end the codebook becomes a few k-means rounds over them."""
        self._recent.append(latents.movedim(1, -1).reshape(-1, latents.shape[1]))
        self._recent = self._recent[-64:]
        if self.calls < self.warmup:
            return
        pool = torch.cat(self._recent)
        self._recent = []
        self.codebook.copy_(pool[torch.randint(len(pool), (len(self.codebook),))])
        for _ in range(8):
            codes = self.codes(pool)
            counts = torch.bincount(codes, minlength=len(self.codebook)).float()
            sums = torch.zeros_like(self.codebook).index_add_(0, codes, pool)
            self.codebook.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1.0)[:, None], self.codebook))
        self.counts.fill_(1.0)
        self.sums.copy_(self.codebook)

    @torch.no_grad()
    def _follow(self, latents: Tensor, codes: Tensor) -> None:
        counts = torch.bincount(codes, minlength=len(self.codebook)).to(latents.dtype)
        sums = torch.zeros_like(self.codebook).index_add_(0, codes, latents)
        self.counts.lerp_(counts, 1.0 - self.decay)
        self.sums.lerp_(sums, 1.0 - self.decay)
        # Dead: used less than a hundredth as often as the average. 1024 codes are worth 10 bits only when all live.
        dead = self.counts < 0.01 * len(latents) / len(self.codebook)
        fresh = latents[torch.randint(len(latents), (int(dead.sum()),), device=latents.device)]
        self.counts[dead] = len(latents) / len(self.codebook)
        self.sums[dead] = fresh * self.counts[dead, None]
        self.codebook.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])


def reconstruction_loss(pixels_hat: Tensor, pixels: Tensor) -> Tensor:
    """Absolute plus squared error: the first keeps thin outlines that the second would average away."""
    return F.l1_loss(pixels_hat, pixels) + F.mse_loss(pixels_hat, pixels)
