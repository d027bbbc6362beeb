"""How much of an image survives its tokens, and how many of the codes are used."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fluidscale.tokens.image import Tokenizer


def reconstruct(tokenizer: Tokenizer, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images through their tokens; continuous tokens are drawn from the posterior, as models learn them."""
    return tokenizer.decode(tokenizer.sample(tokenizer.encode(images), torch.Generator().manual_seed(seed)))


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, averaged over images."""
    return float(psnrs(images, others).mean())


def psnrs(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, in dB."""
    error = ((images.astype(np.float64) - others) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-6))


def code_use(codes: Tensor, vocab_size: int) -> dict[str, float]:
    """Codes that occur among (..) codes, and their perplexity: how many equally used ones would be as varied."""
    counts = torch.bincount(codes.flatten(), minlength=vocab_size).double()
    shares = counts[counts > 0] / counts.sum()
    return {"codes_used": len(shares), "code_perplexity": float((-(shares * shares.log()).sum()).exp())}
