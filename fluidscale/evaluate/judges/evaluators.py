"""Published judges as evaluators of a run on real images: GenEval, FID, FD-DINOv2 and CLIPScore beside its losses.

The run's spec says which of them look, and at which prompts; the placement says where their files are. Every process of
the run draws and judges its share of the images, each image once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluidscale.evaluate.extract import Extractor
from fluidscale.evaluate.generate import Drawing, draw_all
from fluidscale.evaluate.geneval import show_grid
from fluidscale.evaluate.judges.clip import Clip, ColorClassifier, load_clip
from fluidscale.evaluate.judges.dinov2 import load_dinov2
from fluidscale.evaluate.judges.inception import load_inception
from fluidscale.evaluate.judges.mask2former import Mask2FormerDetector, load_mask2former
from fluidscale.evaluate.judges.official import KIND, check_official, official_facts, official_geneval
from fluidscale.evaluate.judges.pretrained import weights_sha256
from fluidscale.evaluate.judges.reference import Reference, load_reference
from fluidscale.evaluate.judges.scores import clip_protocol, clip_score, coco_distances, coco_protocol
from fluidscale.evaluate.judges.selftest import Device, clip_golden, detector_golden, features_golden, self_tested
from fluidscale.evaluate.posed import posed_protocol
from fluidscale.evaluate.protocol import Progress, Score, Subject, silent
from fluidscale.evaluate.rules import check_prompts
from fluidscale.inputs import there
from fluidscale.published import judge_asset, reference_facts
from fluidscale.spec import InvalidInput, RunSpec, canonical
from fluidscale.world.prompts import check_text, read_prompts


@dataclass(frozen=True)
class OfficialGenEval:
    """`geneval` and `geneval_<tag>` by GenEval's own detector and colours, on its own 553 prompts."""

    name: str = "geneval"

    def wanted(self, spec: RunSpec) -> bool:
        return self.name in spec.evaluate.judges and spec.evaluate.geneval_images_per_prompt > 0

    def protocol(self, subject: Subject) -> str:
        detector, clip = (_file(subject, name) for name in ("detector", "clip"))
        facts = official_facts(detector.name, weights_sha256(detector), weights_sha256(clip))
        return posed_protocol(KIND, self._drawing(subject).prompts, facts)

    def drawings(self, subject: Subject) -> Sequence[Drawing]:
        drawing = self._drawing(subject)
        check_official(drawing.prompts)
        _, detector = self._judges(subject)
        check_prompts(drawing.prompts, detector.classes, detector.colors)
        return [drawing]

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        clip, detector = self._judges(subject)
        (samples,) = draw_all([self._drawing(subject)], progress)
        show_grid(subject, samples)
        yield from official_geneval(samples, detector, ColorClassifier(clip), clip.sha256, subject.share, progress)

    def _drawing(self, subject: Subject) -> Drawing:
        spec = subject.spec.evaluate
        prompts = _prompts(subject, "geneval_prompts", spec.geneval_prompts_sha256)
        repeats = range(spec.geneval_images_per_prompt)
        rows = [{"index": index, **prompt} for index, prompt in enumerate(prompts) for _ in repeats]
        return Drawing(subject, self.name, rows)

    def _judges(self, subject: Subject) -> tuple[Clip, Mask2FormerDetector]:
        detector = self_tested(load_mask2former, detector_golden, _file(subject, "detector"), subject.device)
        return _clip(subject), detector


@dataclass(frozen=True)
class ReferenceDistance:
    """`fid` with Inception (and kid, precision, recall) or `fd` with DINOv2, and `<name>_inf` of enough images."""

    name: str
    network: str  # the name of its file; that of the reference ends in _reference
    load: Callable[[Path, Device], Extractor]

    def wanted(self, spec: RunSpec) -> bool:
        return self.name in spec.evaluate.judges and spec.evaluate.fd_images > 0

    def protocol(self, subject: Subject) -> str:
        facts, rows = reference_facts(_file(subject, f"{self.network}_reference")), _captions(subject).prompts
        return coco_protocol(facts["extractor"], rows, facts, canonical(subject.spec.evaluate.sampling))[0]

    def drawings(self, subject: Subject) -> Sequence[Drawing]:
        drawing = _captions(subject)
        self._judges(subject)
        return [drawing]

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        network, reference = self._judges(subject)
        (samples,) = draw_all([_captions(subject)], progress)
        count = subject.spec.evaluate.fd_images
        yield from coco_distances(samples, network, reference, count, subject.share, progress)

    def _judges(self, subject: Subject) -> tuple[Extractor, Reference]:
        path, own = _file(subject, f"{self.network}_reference"), subject.tokenizer.resolution
        if (side := reference_facts(path)["side"]) != own:
            raise InvalidInput(f"{path}: images of {side} px, {subject.spec.id} draws {own}; a distance needs the same")
        network = self_tested(self.load, features_golden, _file(subject, self.network), subject.device)
        return network, load_reference(path, network)


@dataclass(frozen=True)
class ClipScore:
    """`clip_score` of the images drawn for the captions of `fid_prompts`."""

    name: str = "clip_score"

    def wanted(self, spec: RunSpec) -> bool:
        return self.name in spec.evaluate.judges and spec.evaluate.fd_images > 0

    def protocol(self, subject: Subject) -> str:
        return clip_protocol(_captions(subject).prompts, weights_sha256(_file(subject, "clip")))[0]

    def drawings(self, subject: Subject) -> Sequence[Drawing]:
        drawing = _captions(subject)
        _clip(subject)
        return [drawing]

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        clip = _clip(subject)
        (samples,) = draw_all([_captions(subject)], progress)
        yield clip_score(samples, clip, subject.share, progress)


PUBLISHED = (
    OfficialGenEval(),
    ReferenceDistance("fid", "inception", load_inception),
    ReferenceDistance("fd", "dinov2", load_dinov2),
    ClipScore(),
)


def _captions(subject: Subject) -> Drawing:
    """An image each for the first captions of the file: as many as the spec asks for, for all three scores."""
    asked = subject.spec.evaluate
    rows = _prompts(subject, "fid_prompts", asked.fid_prompts_sha256)
    if len(rows) < asked.fd_images:
        path = _file(subject, "fid_prompts")
        raise InvalidInput(f"{path}: {len(rows)} prompts, {subject.spec.id} draws {asked.fd_images}")
    return Drawing(subject, "captions", rows[: asked.fd_images])


def _prompts(subject: Subject, name: str, sha256: str) -> list[dict[str, Any]]:
    """The lines of a prompt file, which must be the one that the spec names."""
    path = _file(subject, name)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise InvalidInput(f"{path}: not the prompts that {subject.spec.id} names ({sha256[:12]}..); put them back")
    return read_prompts(path, check_text)


def _clip(subject: Subject) -> Clip:
    return self_tested(load_clip, clip_golden, _file(subject, "clip"), subject.device)


def _file(subject: Subject, name: str) -> Path:
    """A judge's file by its name in the sweep. Raises InvalidInput when it is not where the placement says."""
    path = subject.placement.asset(judge_asset(name), f"judges: {name}")
    return there(path, f"judges: {name}")
