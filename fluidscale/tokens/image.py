"""Images to tokens and back, behind one protocol, so that models and data never know which tokenizer is in use.

Images are numpy uint8 (B, H, W, 3), as the world draws them and PNG files hold them; tokens are tensors, as models use
them. Inside, pixels are scaled to [-1, 1] (0 -> -1, 255 -> 1); decoded pixels are clamped there and rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from fluidscale.inputs import TokenizerCard, check_card
from fluidscale.spec import InvalidInput
from fluidscale.tokens.networks import FACTOR, KLAutoencoder, VQAutoencoder
from fluidscale.tokens.shipped import verified

# What scores on this tokenizer's images are to be read against, as named on its card.
REFERENCES = ("fd_floor", "fd_real_floor", "geneval_ceiling", "geneval_floor", "geneval_real")
# Images, and pixels, per pass through a network: they bound the memory of a call, whatever its size.
CHUNK, CHUNK_PIXELS = 256, 2**20

Network = TypeVar("Network", bound=nn.Module)


@runtime_checkable
class Tokenizer(Protocol):
    """What data and evaluation need of a tokenizer. `grid` is tokens per side, so L = grid * grid."""

    kind: str  # continuous | discrete
    resolution: int  # of the images, px per side
    grid: int
    channels: int  # of one token; discrete: 0
    vocab_size: int  # continuous: 0
    log_scale: float  # nats a token that z-scoring added to a density: the summed logs of the scales; discrete: 0
    sha256: str
    references: dict[str, Any]  # floors and ceilings of scores on its images, as far as they were measured

    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 (B, H, W, 3) -> int64 codes (B, L), or float32 moments (B, L, 2 C): z-scored mean, then deviation."""
        ...

    def sample(self, moments: Tensor, rng: torch.Generator) -> Tensor:
        """Moments (B, L, 2 C) -> a draw (B, L, C); codes are returned as they are."""
        ...

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Codes (B, L) or z-scored latents (B, L, C) -> uint8 (B, H, W, 3)."""
        ...


class KLTokenizer:
    """The KL autoencoder's continuous tokens, z-scored per channel so that a diffusion head sees unit variance."""

    kind = "continuous"
    vocab_size = 0

    def __init__(self, network: Any, card: dict[str, Any], device: torch.device) -> None:
        self.network, self.device = network, device
        self.resolution, self.grid, self.channels = card["resolution"], card["grid"], card["channels"]
        self.sha256, self.references = card["sha256"], references(card)
        # Another project's network has one scale for all channels.
        self.log_scale = float(network.scale.double().expand(self.channels).log().sum())

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> Tensor:
        return torch.cat([self._moments(part) for part in _chunks(images, self.resolution)])

    def _moments(self, images: np.ndarray) -> Tensor:
        mean, std = self.network.moments(to_pixels(images, self.device))
        shift, scale = self.network.shift[:, None, None], self.network.scale[:, None, None]
        return torch.cat(((mean - shift) / scale, std / scale), dim=1).flatten(2).transpose(1, 2).cpu()

    def sample(self, moments: Tensor, rng: torch.Generator) -> Tensor:
        mean, std = moments.chunk(2, dim=-1)
        return mean + std * torch.randn(std.shape, generator=rng, device=rng.device).to(std)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> np.ndarray:
        if tokens.ndim != 3 or tokens.shape[1:] != (self.grid**2, self.channels):
            raise InvalidInput(f"expected latents (B, {self.grid**2}, {self.channels}), got {tuple(tokens.shape)}")
        images = []
        for part in tokens.split(chunk(self.resolution)):
            latents = part.to(self.device, torch.float32) * self.network.scale + self.network.shift
            maps = latents.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            images.append(to_images(self.network.decoder(maps)))
        return np.concatenate(images)


class VQTokenizer:
    """The vector-quantised autoencoder's codes."""

    kind = "discrete"
    channels = 0
    log_scale = 0.0

    def __init__(self, network: Any, card: dict[str, Any], device: torch.device) -> None:
        self.network, self.device = network, device
        self.resolution, self.grid, self.vocab_size = card["resolution"], card["grid"], card["vocab_size"]
        self.sha256, self.references = card["sha256"], references(card)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> Tensor:
        codes = []
        for part in _chunks(images, self.resolution):
            latents = self.network.encoder(to_pixels(part, self.device)).flatten(2).transpose(1, 2)
            codes.append(self.network.codes(latents.flatten(0, 1)).view(len(part), -1).cpu())
        return torch.cat(codes)

    def sample(self, moments: Tensor, rng: torch.Generator) -> Tensor:
        return moments

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> np.ndarray:
        if tokens.ndim != 2 or tokens.shape[1] != self.grid**2 or tokens.is_floating_point():
            raise InvalidInput(f"expected codes (B, {self.grid**2}), got {tuple(tokens.shape)} of {tokens.dtype}")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            least, most = int(tokens.min()), int(tokens.max())
            raise InvalidInput(f"codes run from 0 to {self.vocab_size - 1}, got {least} to {most}")
        images, codebook = [], self.network.codebook
        for part in tokens.split(chunk(self.resolution)):
            maps = codebook[part.to(self.device)].transpose(1, 2).unflatten(2, (self.grid, self.grid))
            images.append(to_images(self.network.decoder(maps)))
        return np.concatenate(images)


def references(card: dict[str, Any]) -> dict[str, Any]:
    """Those reference numbers of a card that a run's row repeats; a number not measured is absent."""
    return {key: card[key] for key in REFERENCES if key in card}


def build_network(card: dict[str, Any]) -> KLAutoencoder | VQAutoencoder:
    """The untrained network that a tokenizer's card describes."""
    shape = card["network"]
    if card["kind"] == "continuous":
        return KLAutoencoder(shape["widths"], card["channels"], shape["kl_weight"])
    return VQAutoencoder(shape["widths"], shape["code_width"], card["vocab_size"], shape["warmup"])


def load_tokenizer(name_or_path: str, device: torch.device | str = "cpu") -> KLTokenizer | VQTokenizer:
    """A shipped tokenizer by name or hash, one's own by the path of its .safetensors (card beside it), hash-checked,
    or another project's by its folder.

    Raises InvalidInput when it is missing, damaged or no tokenizer.
    """
    if Path(name_or_path).is_dir():
        from fluidscale.tokens.foreign import load_network

        return as_tokenizer(*load_network(Path(name_or_path)), device)
    network, card = load_carded(name_or_path, "tokenizer", ("continuous", "discrete"), build_network)
    check_card(card, name_or_path, TokenizerCard)
    return as_tokenizer(network, card, device)


def load_carded(
    name_or_path: str, what: str, kinds: tuple[str, ...], build: Callable[[dict[str, Any]], Network]
) -> tuple[Network, dict[str, Any]]:
    """What `build` makes of a card, with the weights beside it, and the card; both hash-checked.

    Raises InvalidInput when there is none of this name or path, when it is damaged or its card is not of it.
    """
    data, card = verified(name_or_path)
    if card.get("kind") not in kinds:
        raise InvalidInput(f"{name_or_path}: its card says {card.get('kind')!r}, which is not a {what}")
    try:
        network = build(card)
        load_weights(network, data)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InvalidInput(f"{name_or_path}: its card does not describe its weights ({reason})") from error
    return network, card


def as_tokenizer(
    network: nn.Module, card: dict[str, Any], device: torch.device | str = "cpu"
) -> KLTokenizer | VQTokenizer:
    """Wraps a network in eval mode on `device`; `card` needs kind, resolution, grid, channels, vocab_size, sha256."""
    network = network.to(device).eval().requires_grad_(False)
    wrap = {"continuous": KLTokenizer, "discrete": VQTokenizer}[card["kind"]]
    return wrap(network, card, torch.device(device))


def load_weights(network: nn.Module, data: bytes) -> None:
    """Fills a network from safetensors bytes, whatever precision they are stored in; computing stays float32."""
    network.load_state_dict({key: value.float() for key, value in load_safetensors(data).items()})


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).movedim(-1, 1).float() / 127.5 - 1.0


def to_images(pixels: Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), clamped and rounded."""
    values = ((pixels.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(values.movedim(1, -1).cpu().numpy())


def _chunks(images: np.ndarray, resolution: int) -> list[np.ndarray]:
    if images.ndim != 4 or images.shape[1:] != (resolution, resolution, 3) or images.dtype != np.uint8:
        raise InvalidInput(
            f"expected uint8 images (B, {resolution}, {resolution}, 3), got {images.dtype} {tuple(images.shape)}"
        )
    size = chunk(resolution)
    return [images[k : k + size] for k in range(0, max(len(images), 1), size)]


def chunk(resolution: int) -> int:
    """Images of one pass."""
    return max(1, min(CHUNK, CHUNK_PIXELS // resolution**2))


__all__ = ["FACTOR", "KLTokenizer", "Tokenizer", "VQTokenizer", "load_tokenizer"]
