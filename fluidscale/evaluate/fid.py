"""Fréchet distance between drawn and real images, and its kin, from one pass of a feature network.

Images are drawn for the captions of real scenes that were never trained on, and compared with a larger, disjoint set of
real scenes. The distance is called after its features (FD-icons32): FID is said of Inception's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluidscale.evaluate.distances import (
    LEAST_IMAGES_A_FEATURE,
    Moments,
    frechet,
    frechet_unbiased,
    jackknife,
    kernel_distance,
    moments,
    precision_recall,
)
from fluidscale.evaluate.extract import features_of, load_features_file, save_features_file
from fluidscale.evaluate.features import IconFeatures, load_features
from fluidscale.evaluate.generate import Drawing, draw_all
from fluidscale.evaluate.protocol import Metric, Progress, Score, Subject, protocol_id, silent
from fluidscale.spec import RunSpec, canonical
from fluidscale.world import World

# Where in the stream of real scenes the captions and the reference begin: far apart, and far from validation's (0).
CAPTIONS_START, REFERENCE_START = 1_000_000, 2_000_000
# Real scenes in the reference: at least this many, and at least four times the drawn images.
LEAST_REFERENCE, REFERENCE_RATIO = 4096, 4
_SPLIT = "seen"
_BATCH = 256


@dataclass(frozen=True)
class FrechetDistance:
    """`fd` at a fixed number of images, `fd_inf` without that number's bias, `kid`, `precision`, `recall`."""

    name: str = "fd"

    def wanted(self, spec: RunSpec) -> bool:
        return spec.data.world is not None and spec.evaluate.fd_images > 0

    def protocol(self, subject: Subject) -> str:
        spec = subject.spec.evaluate
        return protocol_id(
            f"fd-{subject.spec.data.name}-n{spec.fd_images}-g{spec.sampling.guidance_scale:g}",
            reference=reference_id(subject, load_features(subject.features_name)),
            captions=[_SPLIT, CAPTIONS_START, spec.fd_images],
        )

    def drawings(self, subject: Subject) -> Sequence[Drawing]:
        load_features(subject.features_name)
        captions = scene_captions(subject.world, subject.spec.evaluate.fd_images)
        return [Drawing(subject, "captions", captions)]

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        protocol = self.protocol(subject)
        network = load_features(subject.features_name, subject.device)
        (samples,) = draw_all(self.drawings(subject), progress)
        drawn = features_of(samples, network, subject.cache_dir, subject.share, progress)
        real = reference_features(subject, network, progress)
        facts = {"features": network.name, "features_sha256": network.sha256, "reference_images": len(real)}
        yield from distances(self.name, drawn, real, network.name.removesuffix("-features"), protocol, facts)


def distances(
    name: str, drawn: np.ndarray, real: np.ndarray, features: str, protocol: str, facts: dict[str, Any]
) -> Iterator[Score]:
    """All that two sets of features (n, F) and (m, F) say: `<name>_inf`, kid, precision, recall, `<name>` last.

    Of fewer images than the extrapolation can bear there is no `<name>_inf`; `extra` of `<name>` says why.
    """
    reference, n = moments(real), len(drawn)

    def score(name: str, value: float, se: float, unit: str, higher: bool) -> Score:
        return Score(Metric(name, unit, higher), value, se, n, protocol, facts)

    if refusal := too_few(drawn):
        facts = {**facts, f"{name}_inf_refused": refusal}
    else:
        yield score(f"{name}_inf", *with_error(drawn, reference, unbiased=True), f"{name.upper()}-{features}", False)
    yield score("kid", *kernel_distance(drawn, real), f"KID-{features}", False)
    precision, recall, recall_error = precision_recall(drawn, real)
    yield score("precision", precision, float(np.sqrt(precision * (1 - precision) / n)), "fraction", True)
    yield score("recall", recall, recall_error, "fraction", True)
    yield score(name, *with_error(drawn, reference), f"{name.upper()}-{features}", False)


def too_few(drawn: np.ndarray) -> str:
    """Why features (n, F) cannot be extrapolated to infinitely many images; empty when they can."""
    n, width = drawn.shape
    if n >= LEAST_IMAGES_A_FEATURE * width:
        return ""
    return f"FEW_IMAGES: {n} images for {width} features, the extrapolation needs {LEAST_IMAGES_A_FEATURE} a feature"


def with_error(features: np.ndarray, reference: Moments, unbiased: bool = False) -> tuple[float, float]:
    """The Fréchet distance of features (n, F) to a reference, at n or extrapolated, with its standard error."""

    def distance(f: np.ndarray) -> float:
        return frechet_unbiased(f, reference) if unbiased else frechet(moments(f), reference)

    return distance(features), jackknife(features, distance)


def scene_captions(world: World, count: int) -> list[dict[str, str]]:
    """The captions of `count` real scenes, as prompts."""
    return [{"prompt": scene.caption} for scene in world.describe(CAPTIONS_START, count, _SPLIT)]


def reference_count(fd_images: int) -> int:
    return max(LEAST_REFERENCE, REFERENCE_RATIO * fd_images)


def reference_id(subject: Subject, network: IconFeatures) -> str:
    """Names the reference features: which scenes, which world, which network."""
    scenes = [_SPLIT, REFERENCE_START, reference_count(subject.spec.evaluate.fd_images)]
    return protocol_id("reference", scenes=scenes, world=canonical(subject.spec.data.world), network=network.sha256)


def reference_features(subject: Subject, network: IconFeatures, progress: Progress = silent) -> np.ndarray:
    """Features (m, F) of the real reference scenes, computed once for all runs of a folder."""
    path = subject.cache_dir / f"{reference_id(subject, network)}.npy"
    count = reference_count(subject.spec.evaluate.fd_images)
    if (known := load_features_file(path, (count, network.width))) is not None:
        return known
    features = scene_features(subject.world, network, REFERENCE_START, count, progress)
    save_features_file(path, features)
    return features


def scene_features(
    world: World, network: IconFeatures, start: int, count: int, progress: Progress = silent
) -> np.ndarray:
    """Features (count, F) of real scenes, rendered and forgotten batch by batch."""
    parts = []
    for first in range(start, start + count, _BATCH):
        images, _, _ = world.scenes(first, min(_BATCH, start + count - first), _SPLIT)
        parts.append(network(images))
        progress("reference", first + len(images) - start, count)
    return np.concatenate(parts)
