"""Whether a second detector, trained apart from the first, gives the same verdicts on a run's own pictures.

A detector can be right on every real scene and still be fooled by a generator's flaws. Two that share neither
architecture nor scenes nor weights are not fooled alike, so their agreement on drawn images is what says that the
score is about the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.generate import Drawing, draw_all
from fluidscale.evaluate.geneval import judge_samples, per_prompt, prompt_drawings, prompts_of, summarise
from fluidscale.evaluate.protocol import Metric, Progress, Score, Subject, protocol_id, silent
from fluidscale.evaluate.rules import Verdict
from fluidscale.evaluate.samples import Samples
from fluidscale.spec import RunSpec, canonical
from fluidscale.tokens.shipped import exists


@dataclass(frozen=True)
class DetectorAgreement:
    """`detector_agreement`: the share of drawn images on which both detectors give the same verdict.

    Images that one holds right are few where a model is weak, and then two detectors agree by chance: `extra` has
    Cohen's kappa, which is free of that, and the share of images in which both see the same objects.
    """

    name: str = "detector_agreement"

    def wanted(self, spec: RunSpec) -> bool:
        asked = spec.data.world is not None and spec.evaluate.geneval_images_per_prompt > 0
        return asked and exists(f"{spec.data.name}-detector2")

    def protocol(self, subject: Subject) -> str:
        spec = subject.spec.evaluate
        first, second = (load_detector(name) for name in _names(subject))
        return protocol_id(
            f"{self.name}-{subject.spec.data.name}-x{spec.geneval_images_per_prompt}-g{spec.sampling.guidance_scale:g}",
            detectors=[first.sha256, second.sha256],
            prompts=prompts_of(subject, "seen"),
            world=canonical(subject.spec.data.world),
        )

    def drawings(self, subject: Subject) -> Sequence[Drawing]:
        return prompt_drawings(subject, ("seen",), load_detector(subject.detector_name))

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        first, second = (load_detector(name, subject.device) for name in _names(subject))
        for samples in draw_all(prompt_drawings(subject, ("seen",), first), progress):
            verdicts = [judge_samples(samples, one, progress) for one in (first, second)]
            yield agreement(samples, verdicts, self.protocol(subject), [first.sha256, second.sha256])


def agreement(samples: Samples, verdicts: Sequence[Sequence[Verdict]], protocol: str, sha256: list[str]) -> Score:
    """How two detectors' verdicts on the same images compare."""
    right = np.array([[verdict.correct for verdict in of_one] for of_one in verdicts])
    same = right[0] == right[1]
    overall = summarise(*per_prompt(same, samples.rows)).overall
    share = right.mean(axis=1)
    by_chance = float(share[0] * share[1] + (1 - share[0]) * (1 - share[1]))
    kappa = (float(same.mean()) - by_chance) / (1 - by_chance) if by_chance < 1 else None
    objects = [_objects(a) == _objects(b) for a, b in zip(*verdicts, strict=True)]
    extra: dict[str, Any] = {
        "detectors_sha256": sha256,
        "scores": [summarise(*per_prompt(one, samples.rows)).overall.value for one in right],
        "kappa": kappa,
        "same_objects": float(np.mean(objects)),
        "only_first_right": int((right[0] & ~right[1]).sum()),
        "only_second_right": int((right[1] & ~right[0]).sum()),
    }
    return Score(Metric("detector_agreement", "fraction", True), overall.value, overall.se, len(same), protocol, extra)


def _objects(verdict: Verdict) -> Counter[str]:
    """How many of each class were admitted: what both detectors should see alike."""
    return Counter({cls: len(found) for cls, found in verdict.found.items()})


def _names(subject: Subject) -> tuple[str, str]:
    return subject.detector_name, f"{subject.spec.data.name}-detector2"
