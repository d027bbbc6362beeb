"""Which sample stands at which position of training: a pure function, so nothing needs to be saved to resume.

The sample at global position k is a keyed permutation of (seed, epoch) at k. Every rank takes its slice of each global
batch, so the global batches are the same for any world size, and every model of a ladder sees the same data order.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6  # a Feistel network of at least 4 rounds is a pseudo-random permutation (Luby and Rackoff, 1988)


def positions(batch: int, steps: range, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Global positions, int64 (steps, batch // world_size), that this rank reads at each of `steps` (from 0)."""
    share, rest = divmod(batch, world_size)
    if rest:
        raise ValueError(f"batch {batch} is not divisible by the world size {world_size}")
    first = np.asarray(steps, dtype=np.int64) * batch + rank * share
    return first[:, None] + np.arange(share, dtype=np.int64)


def samples_at(seed: int, num_samples: int, where: np.ndarray) -> np.ndarray:
    """The sample, int64 of the same shape, at each global position: every epoch is a permutation of its own."""
    epochs, within = np.divmod(where, num_samples)
    out = np.empty_like(where)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = permute(within[chosen], num_samples, f"{seed}:{epoch}")
    return out


def permute(positions: np.ndarray, num_samples: int, key: str) -> np.ndarray:
    """A keyed permutation of range(num_samples) at `positions` only: a Feistel network with cycle walking."""
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    digest = hashlib.sha256(key.encode()).digest()
    keys = np.frombuffer(digest[: 4 * _ROUNDS], dtype="<u4").astype(np.uint64)
    values = positions.astype(np.uint64)
    out = _feistel(values, keys, half_bits)
    while (outside := out >= num_samples).any():
        # The network permutes a power of four; walking the cycle until inside permutes the range itself.
        out[outside] = _feistel(out[outside], keys, half_bits)
    return out.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        # splitmix64's finaliser as the round function (Steele, Lea and Flood, 2014).
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << shift) | right
