"""GenEval itself: the official prompts, its Mask2Former and CLIP, on a folder of 553 x k images.

The rules are those of `rules`, which also judge the icon world; here is only what is official about it: that nothing
may be missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fluidscale.evaluate.geneval import per_prompt
from fluidscale.evaluate.posed import posed_geneval
from fluidscale.evaluate.protocol import Detection, Detector, Progress, Score, silent
from fluidscale.evaluate.samples import Samples
from fluidscale.evaluate.share import Share
from fluidscale.spec import InvalidInput
from fluidscale.world.prompts import PROTOCOL

KIND = "geneval-official"


class Colors(Protocol):
    """Names the colour of a detected object."""

    def color(self, image: np.ndarray, detection: Detection) -> str: ...


def official_geneval(
    samples: Samples,
    detector: Detector,
    colors: Colors,
    colors_sha256: str,
    share: Share | None = None,
    progress: Progress = silent,
) -> Iterator[Score]:
    """`geneval_<tag>` and `geneval`, as `posed_geneval` has them.

    Raises InvalidInput unless all 553 prompts are there with the same number of images each.
    """
    check_official(samples.rows)
    facts = official_facts(detector.name, detector.sha256, colors_sha256)
    yield from posed_geneval(KIND, samples, detector, facts, colors.color, share, progress)


def official_facts(name: str, detector_sha256: str, clip_sha256: str) -> dict[str, str]:
    """What the protocol says of the judges; `name` is the detector's folder."""
    return {"detector": name, "detector_sha256": detector_sha256, "clip_sha256": clip_sha256}


def check_official(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InvalidInput unless `rows` are GenEval's 553 prompts, each with the same number of images."""
    if missing := sorted({"tag", "prompt", "include"} - set.intersection(*map(set, rows))) if rows else ["prompts"]:
        raise InvalidInput(f"not GenEval's prompts: {missing[0]} is missing; draw evaluation_metadata.jsonl as it is")
    correct, tags = per_prompt([False] * len(rows), rows)
    if (found := Counter(tags)) != PROTOCOL:
        short = ", ".join(f"{tag} {found[tag]} of {n}" for tag, n in PROTOCOL.items() if found[tag] != n)
        raise InvalidInput(
            f"{len(tags)} prompts, GenEval has {sum(PROTOCOL.values())} ({short}); fewer is another score"
        )
    images = Counter(map(len, correct))
    if len(images) != 1:
        raise InvalidInput(f"prompts have {sorted(images)} images each; GenEval needs the same number of every prompt")
