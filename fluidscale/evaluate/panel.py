"""Who judges the images of a prompt file: an icon world's detector, or GenEval's own with CLIP."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.posed import posed_geneval
from fluidscale.evaluate.protocol import Progress, Score, Subject
from fluidscale.evaluate.rules import check_prompts
from fluidscale.evaluate.samples import Samples
from fluidscale.spec import InvalidInput
from fluidscale.tokens.shipped import exists

Judge = Callable[[Samples, Progress], Iterator[Score]]


def judge_of(
    subject: Subject, rows: Sequence[Mapping[str, Any]], detector: str | None, clip: Path | None
) -> Judge | None:
    """What judges `rows`, an entry an image, drawn by `subject`; None where nothing was named and nothing fits.

    Raises InvalidInput, before anything is drawn, when the rows are not what the named judge can judge.
    """
    if detector and Path(detector).is_dir():
        return _official(subject, rows, Path(detector), clip)
    if clip:
        raise InvalidInput("--clip goes with --detector, the folder of GenEval's Mask2Former")
    if not detector and not (all("include" in row for row in rows) and exists(subject.detector_name)):
        return None
    found = load_detector(detector or subject.detector_name, subject.device)
    check_prompts(rows, found.classes, found.colors)
    facts = {"detector": found.name, "detector_sha256": found.sha256}
    kind = f"geneval-posed-{subject.spec.data.name}"

    def judge(samples: Samples, progress: Progress) -> Iterator[Score]:
        return posed_geneval(kind, samples, found, facts, share=subject.share, progress=progress)

    return judge


def _official(subject: Subject, rows: Sequence[Mapping[str, Any]], detector: Path, clip: Path | None) -> Judge:
    from fluidscale.evaluate.judges.clip import ColorClassifier, load_clip
    from fluidscale.evaluate.judges.mask2former import load_mask2former
    from fluidscale.evaluate.judges.official import check_official, official_geneval
    from fluidscale.evaluate.judges.selftest import clip_golden, detector_golden, self_tested

    if clip is None:
        raise InvalidInput("--detector needs --clip: GenEval's colours are CLIP's")
    check_official(rows)
    colors = self_tested(load_clip, clip_golden, clip, subject.device)
    found = self_tested(load_mask2former, detector_golden, detector, subject.device)
    print(f"detector {found.sha256}\nclip {colors.sha256}", file=sys.stderr)

    def judge(samples: Samples, progress: Progress) -> Iterator[Score]:
        return official_geneval(samples, found, ColorClassifier(colors), colors.sha256, subject.share, progress)

    return judge
