"""What the scores of a model are to be read against: floors and ceilings of world, tokenizer and judges.

A Fréchet distance of 0 and a score of 1 are out of reach for any model: real images are some distance from other real
images, tokens lose detail, and detectors err. These numbers say how much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fluidscale.evaluate.distances import moments
from fluidscale.evaluate.features import IconFeatures
from fluidscale.evaluate.fid import CAPTIONS_START, REFERENCE_START, reference_count, scene_features, with_error
from fluidscale.evaluate.geneval import Summary, grouped, judge_images, repeated
from fluidscale.evaluate.protocol import Detector, Progress, silent
from fluidscale.tokens.image import Tokenizer
from fluidscale.world import World

Images = np.ndarray


def references(
    world: World,
    tokenizer: Tokenizer | None = None,
    detector: Detector | None = None,
    features: IconFeatures | None = None,
    fd_images: int = 512,
    images_per_prompt: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Every reference number that the given parts allow, each with its standard error under `<name>_se`.

    With `features`: fd_real_floor (real scenes), and with a tokenizer fd_floor (the same scenes through its tokens), at
    `fd_images`, as a model is measured. With `detector`: geneval_real (real scenes of every seen prompt),
    geneval_ceiling (the same through the tokens; needs the tokenizer), geneval_floor (prompts shuffled among scenes).
    """
    through = _through(tokenizer, seed) if tokenizer is not None else None
    found: dict[str, Any] = {}
    if features is not None:
        found |= _fd_references(world, features, through, fd_images, progress)
    if detector is not None:
        found |= _geneval_references(world, detector, through, images_per_prompt, seed, progress)
    return found


def prompt_scenes(world: World, split: str, images_per_prompt: int, seed: int) -> tuple[list[Any], Images]:
    """Prompts, an entry an image, and a real scene for each: uint8 (n, R, R, 3)."""
    rng = np.random.default_rng(seed)
    prompts = repeated(world.prompts(split), images_per_prompt)
    return prompts, np.stack([world.render(world.scene_for(prompt, rng)) for prompt in prompts])


def _through(tokenizer: Tokenizer, seed: int) -> Callable[[Images], Images]:
    """Images to tokens and back; continuous tokens are drawn from the posterior, as models learn them."""

    def through(images: Images) -> Images:
        rng = torch.Generator().manual_seed(seed)
        return tokenizer.decode(tokenizer.sample(tokenizer.encode(images), rng))

    return through


def _fd_references(
    world: World, features: IconFeatures, through: Callable[[Images], Images] | None, n: int, progress: Progress
) -> dict[str, Any]:
    reference = moments(scene_features(world, features, REFERENCE_START, reference_count(n), progress))
    images, _, _ = world.scenes(CAPTIONS_START, n, "seen")
    found: dict[str, Any] = {"fd_images": n}
    for name, shown in {"fd_real_floor": images, "fd_floor": through and through(images)}.items():
        if shown is not None:
            found[name], found[f"{name}_se"] = with_error(features(shown), reference)
    return found


def _geneval_references(
    world: World,
    detector: Detector,
    through: Callable[[Images], Images] | None,
    images_per_prompt: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    prompts, scenes = prompt_scenes(world, "seen", images_per_prompt, seed)

    def score(images: Images, asked: list[Any], groups: list[Any]) -> Summary:
        return grouped(judge_images(images, asked, detector, progress), groups)

    # Some scenes satisfy another scene's prompt by chance: that share is what a model gets for ignoring the text.
    shuffled = [prompts[k] for k in np.random.default_rng(seed + 1).permutation(len(prompts))]
    summaries = {"geneval_real": score(scenes, prompts, prompts), "geneval_floor": score(scenes, shuffled, shuffled)}
    if through is not None:
        summaries["geneval_ceiling"] = score(through(scenes), prompts, prompts)
    found: dict[str, Any] = {"geneval_images": len(prompts)}
    for name, summary in summaries.items():
        found |= {name: summary.overall.value, f"{name}_se": summary.overall.se}
        found[f"{name}_tags"] = {tag: rate.value for tag, rate in summary.tags.items()}
    return found
