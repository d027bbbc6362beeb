"""One pass of a feature network over a set of images, kept by content: every metric is computed from it again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Protocol

import numpy as np

from fluidscale.evaluate.protocol import Progress, protocol_id, silent
from fluidscale.evaluate.samples import Samples
from fluidscale.evaluate.share import Share
from fluidscale.record import write_atomic
from fluidscale.spec import InvalidInput

BATCH = 256


class Extractor(Protocol):
    """A feature network; `sha256` names its weights."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def width(self) -> int: ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> float32 (B, width)."""
        ...


def features_of(
    samples: Samples, network: Extractor, cache: Path, share: Share | None = None, progress: Progress = silent
) -> np.ndarray:
    """Features (n, F) of a folder's images, read back where these images went through this network before."""
    share = share or Share()
    name = protocol_id("features", images=samples.sha256, network=network.sha256)
    path, count = cache / f"{name}.npy", len(samples.rows)
    if (known := load_features_file(path, (count, network.width))) is not None:
        return known
    parts, mine = [np.zeros((0, network.width), np.float32)], samples.part(share.rank, share.ranks)
    for images in mine.batches(BATCH):
        parts.append(network(images))
        progress(f"features of {network.name}", min(sum(map(len, parts)) * share.ranks, count), count)
    features = share.gathered(np.concatenate(parts))
    save_features_file(path, features)
    return features


def load_features_file(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Kept features; None when there are none. Raises InvalidInput when the file is damaged."""
    if not path.exists():
        return None
    try:
        features = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InvalidInput(f"{path}: damaged features ({error}); delete the file") from error
    if features.shape != shape:
        raise InvalidInput(f"{path}: {features.shape}, expected {shape}; delete the file")
    return features


def save_features_file(path: Path, features: np.ndarray) -> None:
    """Processes that need a file at the same moment compute the same numbers: the last rename wins."""
    content = io.BytesIO()
    np.save(content, features)
    write_atomic(path, content.getvalue())
