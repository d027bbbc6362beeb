"""LlamaGen's VQ tokenizer, written from its publication (arXiv 2406.06525; FoundationVision/LlamaGen, vq_model.py).

Names and order are those of its checkpoints; widths are small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, MULTIPLIERS, BLOCKS, LATENTS, CODES, CODE_WIDTH = 32, (1, 2, 2), 2, 32, 512, 8


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).view_as(x)
        return x + self.proj_out(mixed)


class Resample(nn.Module):
    """A 3 x 3 convolution behind nearest upsampling, or one of stride 2 padded to the right and below."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(inputs if k == 0 else outputs, outputs) for k in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[k](x)
        return x


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths, last = [CHANNELS * m for m in MULTIPLIERS], len(MULTIPLIERS) - 1
        self.conv_in = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for k, width in enumerate(widths):
            level = Level(CHANNELS if k == 0 else widths[k - 1], width, BLOCKS, attention=k == last)
            if k != last:
                level.downsample = Resample(width, up=False)
            self.conv_blocks.append(level)
        self.mid, self.norm_out = middle(widths[-1]), norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], LATENTS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [CHANNELS * m for m in reversed(MULTIPLIERS)]
        self.conv_in, self.mid = nn.Conv2d(LATENTS, widths[0], 3, padding=1), middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for k, width in enumerate(widths):
            level = Level(widths[max(k - 1, 0)], width, BLOCKS + 1, attention=k == 0)
            if k != len(widths) - 1:
                level.upsample = Resample(width, up=True)
            self.conv_blocks.append(level)
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODES, CODE_WIDTH)
        self.register_buffer("codebook_used", torch.zeros(65536))


class LlamaGenVQ(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.quantize = Encoder(), Decoder(), Codebook()
        self.quant_conv, self.post_quant_conv = nn.Conv2d(LATENTS, CODE_WIDTH, 1), nn.Conv2d(CODE_WIDTH, LATENTS, 1)

    def latents(self, pixels: Tensor) -> Tensor:
        """(N, 8) before normalisation, image-major."""
        return self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2)

    def codes(self, pixels: Tensor) -> Tensor:
        """The paper's: both sides normalised, then the least squared distance."""
        z, e = F.normalize(self.latents(pixels), dim=-1), F.normalize(self.quantize.embedding.weight, dim=-1)
        distances = z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T
        return distances.argmin(1)

    def decode(self, codes: Tensor, batch: int = 3) -> Tensor:
        vectors = F.normalize(self.quantize.embedding.weight, dim=-1)[codes]
        side = int((len(codes) / batch) ** 0.5)
        return self.decoder(self.post_quant_conv(vectors.view(batch, side, side, -1).permute(0, 3, 1, 2)))
