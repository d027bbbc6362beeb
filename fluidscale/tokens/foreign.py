"""Tokenizers of other projects from local folders, in the form of the in-house networks, behind the same wrappers.

Scaling and shift of a KL autoencoder are applied here: diffusers keeps them in config.json, for the caller to apply.
LlamaGen's codes are the nearest in angle: latents and codebook are normalised (arXiv 2406.06525, section 2.1), which
transformers does when decoding and not when encoding.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluidscale.spec import InvalidInput
from fluidscale.tokens.folders import tokenizer_card, weight_files

MODULES = {
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
    "VQModel": "diffusers.models.autoencoders.vq_model",
    "JanusVQVAE": "transformers.models.janus.modeling_janus",
}


class GroupedKL(nn.Module):
    """diffusers' AutoencoderKL with `group` x `group` latents a token, channels in pixel_unshuffle's order (MAR's)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, vae: Any, group: int, posterior: str) -> None:
        super().__init__()
        self.vae, self.group, self.posterior = vae, group, posterior
        # SD3 and Flux also shift; older configurations name neither, and mean SD 1's scaling.
        shift, scaling = vae.config.get("shift_factor"), vae.config.get("scaling_factor")
        self.register_buffer("shift", torch.tensor([shift or 0.0]))
        self.register_buffer("scale", torch.tensor([1.0 / (scaling or 0.18215)]))

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (B, C, G, G), before scaling; the posterior "mean" deviates by 0."""
        drawn = self.vae.encode(pixels).latent_dist
        mean, std = (F.pixel_unshuffle(part, self.group) for part in (drawn.mean, drawn.std))
        return mean, std if self.posterior == "sample" else torch.zeros_like(std)

    def decoder(self, maps: Tensor) -> Tensor:
        """Unscaled latents (B, C, G, G) -> pixels (B, 3, R, R)."""
        return self.vae.decode(F.pixel_shuffle(maps, self.group)).sample


class NearestCode(nn.Module):
    """diffusers' VQModel: the code nearest in Euclidean distance."""

    def __init__(self, vq: Any) -> None:
        super().__init__()
        self.vq = vq

    @property
    def codebook(self) -> Tensor:
        return self.vq.quantize.embedding.weight

    def encoder(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, R, R) -> latents (B, C, G, G)."""
        return self.vq.quant_conv(self.vq.encoder(pixels))

    def codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) index of the nearest code."""
        return torch.cdist(latents, self.codebook).argmin(dim=1)

    def decoder(self, maps: Tensor) -> Tensor:
        """Codes' vectors (B, C, G, G) -> pixels (B, 3, R, R)."""
        spatial = self.vq.config.norm_type == "spatial"
        return self.vq.decoder(self.vq.post_quant_conv(maps), maps if spatial else None)


class NearestAngle(nn.Module):
    """LlamaGen's VQ-16 as transformers' JanusVQVAE: the code nearest in angle."""

    def __init__(self, vq: Any) -> None:
        super().__init__()
        self.vq = vq

    @property
    def codebook(self) -> Tensor:
        return F.normalize(self.vq.quantize.embedding.weight, dim=-1)

    def encoder(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, R, R) -> latents (B, C, G, G) of length 1."""
        return F.normalize(self.vq.quant_conv(self.vq.encoder(pixels)), dim=1)

    def codes(self, latents: Tensor) -> Tensor:
        """(N, C) -> (N,) index of the nearest code; between vectors of length 1 that is the largest product."""
        return (latents @ self.codebook.T).argmax(dim=1)

    def decoder(self, maps: Tensor) -> Tensor:
        """Codes' vectors (B, C, G, G) -> pixels (B, 3, R, R)."""
        return self.vq.decoder(self.vq.post_quant_conv(maps))


def load_network(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a folder, ready for `as_tokenizer`, and its card.

    Raises InvalidInput when weights are missing, are of another shape, or are a pickle of more than tensors.
    """
    card = tokenizer_card(folder)
    cls = getattr(library(MODULES[card["class"]]), card["class"])
    network = pretrained(cls, folder, torch_dtype=torch.float32)
    if card["kind"] == "continuous":
        return GroupedKL(network, card["group"], card["posterior"]), card
    return (NearestAngle if card["class"] == "JanusVQVAE" else NearestCode)(network), card


def library(module: str) -> Any:
    """A module of an optional package. Raises InvalidInput naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise InvalidInput(f"{package} is needed here: pip install 'fluidscale[paper]' ({error})") from error


def pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    """`cls.from_pretrained` of a local folder that holds every weight of the class; a hub is never asked."""
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            load_pickle(path)
    if cls.__module__.startswith("transformers"):
        library("transformers.utils.logging").disable_progress_bar()
    # Both libraries warn about weights that they had to invent; here that is an error, and said once.
    talkers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.CRITICAL)
    try:
        network, found = cls.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidInput(f"{folder}: does not load as {cls.__name__} ({reason})") from error
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
    if missing := sorted(found["missing_keys"]):
        raise InvalidInput(f"{folder}: {len(missing)} weights of {cls.__name__} are missing, first {missing[0]}")
    if wrong := found.get("mismatched_keys"):
        raise InvalidInput(f"{folder}: {len(wrong)} weights do not fit its config.json, first {min(map(str, wrong))}")
    return network.eval()


def load_pickle(path: Path) -> dict[str, Any]:
    """A pickled file of plain tensors, read without running any of it. Raises InvalidInput for any other."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInput(f"{path}: not a file of plain tensors; it is not opened, as it could run code") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: expected tensors by name, found {type(content).__name__}")
    return content
