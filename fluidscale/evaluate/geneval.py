"""The GenEval-protocol score: draw every prompt, detect, judge by `rules`, and say how sure the score is.

Two standard errors, because they answer two questions. Of the seeds: how far would the score move if the same prompts
were drawn again? Of the prompts (the one to fit with): how far if other prompts of the same kind had been asked?
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.generate import Drawing, draw_all
from fluidscale.evaluate.protocol import (
    Detection,
    Detector,
    Metric,
    Progress,
    Score,
    Subject,
    protocol_id,
    silent,
)
from fluidscale.evaluate.rules import Verdict, check_prompts, judge
from fluidscale.evaluate.samples import Samples
from fluidscale.kept import Kept
from fluidscale.record import write_atomic
from fluidscale.spec import RunSpec, canonical
from fluidscale.world.captions import TAGS
from fluidscale.world.prompts import PROTOCOL

# Images detected in one call: a step of the progress shown.
_BATCH = 256
# The score and the agreement of two detectors look at the same drawing with the same detector.
_VERDICTS: Kept[list[Verdict]] = Kept(4)
# A set's pictures, for the second detector that judges it: bytes that they may take.
_IMAGES: Kept[np.ndarray] = Kept(2**26, weigh=lambda images: images.nbytes)


@dataclass(frozen=True)
class Rate:
    """A share of correct images with the standard errors of its prompts and of its seeds; `se_seed` may be NaN."""

    value: float
    se: float
    se_seed: float
    prompts: int
    images: int


@dataclass(frozen=True)
class Summary:
    """The score and its parts by tag; only tags that have prompts."""

    overall: Rate
    tags: dict[str, Rate]

    def as_json(self) -> dict[str, Any]:
        return {"se_seed": self.overall.se_seed, "tags": {tag: vars(rate) for tag, rate in self.tags.items()}}


def summarise(correct: Sequence[np.ndarray], tags: Sequence[str]) -> Summary:
    """From one boolean array per prompt (its images) and the prompt's tag. Overall = unweighted mean of the tags.

    Errors add in quadrature over tags, which share neither prompts nor seeds. With one image a prompt the error of the
    seeds cannot be told and is NaN; with one prompt of a tag neither can that of the prompts.
    """
    by_tag = {tag: [c for c, t in zip(correct, tags, strict=True) if t == tag] for tag in TAGS}
    rates = {tag: _rate(members) for tag, members in by_tag.items() if members}

    def combined(errors: list[float]) -> float:
        return math.sqrt(sum(e**2 for e in errors)) / len(errors)

    parts = list(rates.values())
    overall = Rate(
        value=float(np.mean([r.value for r in parts])),
        se=combined([r.se for r in parts]),
        se_seed=combined([r.se_seed for r in parts]),
        prompts=sum(r.prompts for r in parts),
        images=sum(r.images for r in parts),
    )
    return Summary(overall, rates)


def judge_images(
    images: np.ndarray,
    prompts: Sequence[Mapping[str, Any]],
    detector: Detector,
    progress: Progress = silent,
    color_of: Callable[[np.ndarray, Detection], str] | None = None,
) -> list[Verdict]:
    """One verdict per image uint8 (n, H, W, 3) against the prompt beside it. Raises InvalidInput on an unfit prompt.

    `color_of` (image, detection) names colours where the detector does not.
    """
    check_prompts(prompts, detector.classes, detector.colors)
    verdicts: list[Verdict] = []
    for start in range(0, len(images), _BATCH):
        for detections in detector.detect(images[start : start + _BATCH]):
            image, prompt = images[len(verdicts)], prompts[len(verdicts)]
            verdict = judge(detections, prompt, partial(color_of, image)) if color_of else judge(detections, prompt)
            # Masks have done their work: those of a whole set would not fit into memory.
            kept = {cls: [replace(one, mask=None) for one in found] for cls, found in verdict.found.items()}
            verdicts.append(replace(verdict, found=kept))
        progress("judging", len(verdicts), len(images))
    return verdicts


def judge_samples(samples: Samples, detector: Detector, progress: Progress = silent) -> list[Verdict]:
    """`judge_images` of all images of a drawing, whose folder's name says which they are."""

    def verdicts() -> list[Verdict]:
        return judge_images(_IMAGES(samples.folder, samples.images), samples.rows, detector, progress)

    return _VERDICTS((samples.folder, detector.sha256), verdicts)


def per_prompt(
    right: Sequence[bool] | np.ndarray, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[np.ndarray], list[str]]:
    """`right`, an entry an image, in one array per prompt, with each prompt's tag.

    Images of one text are one group, or of one `index` where rows have it: a file may pose a text twice.
    """
    groups: dict[tuple[str, str | int], list[bool]] = {}
    for correct, row in zip(right, rows, strict=True):
        groups.setdefault((row["tag"], row.get("index", row["prompt"])), []).append(bool(correct))
    return [np.array(c) for c in groups.values()], [tag for tag, _ in groups]


def grouped(verdicts: Sequence[Verdict], prompts: Sequence[Mapping[str, Any]]) -> Summary:
    """Summary of verdicts whose images come from `prompts`."""
    return summarise(*per_prompt([verdict.correct for verdict in verdicts], prompts))


@dataclass(frozen=True)
class GenEval:
    """`geneval` and `geneval_<tag>` on combinations seen in training, `geneval_unseen` on those held out of it."""

    name: str = "geneval"

    def wanted(self, spec: RunSpec) -> bool:
        return spec.data.world is not None and spec.evaluate.geneval_images_per_prompt > 0

    def protocol(self, subject: Subject) -> str:
        spec = subject.spec.evaluate
        detector = load_detector(subject.detector_name)
        return protocol_id(
            f"geneval-{subject.spec.data.name}-x{spec.geneval_images_per_prompt}-g{spec.sampling.guidance_scale:g}",
            detector=detector.sha256,
            prompts=[prompts_of(subject, split) for split in splits_of(subject.spec)],
            world=canonical(subject.spec.data.world),
        )

    def drawings(self, subject: Subject) -> Sequence[Drawing]:
        return prompt_drawings(subject, splits_of(subject.spec), load_detector(subject.detector_name))

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]:
        protocol = self.protocol(subject)
        detector = load_detector(subject.detector_name, subject.device)
        facts = {"detector": detector.name, "detector_sha256": detector.sha256}
        found = {split: self._summary(subject, split, detector, progress) for split in splits_of(subject.spec)}
        seen, unseen = found["seen"], found.get("unseen")
        if unseen:
            same = [rate.value for tag, rate in seen.tags.items() if tag in unseen.tags] if seen else []
            extra = {**facts, **unseen.as_json(), "seen_same_tags": float(np.mean(same)) if same else None}
            yield rate_score("geneval_unseen", unseen.overall, protocol, extra)
        if seen:
            yield from summary_scores(seen, protocol, facts)

    def _summary(self, subject: Subject, split: str, detector: Detector, progress: Progress) -> Summary | None:
        """Draws and judges one split's prompts; None when the world has none of it."""
        drawings = prompt_drawings(subject, (split,), detector)
        if not drawings:
            return None
        (samples,) = draw_all(drawings, progress)
        if split == "seen":
            show_grid(subject, samples)
        verdicts = judge_samples(samples, detector, progress)
        write_results(samples, verdicts)
        return grouped(verdicts, samples.rows)


def show_grid(subject: Subject, samples: Samples) -> None:
    """Puts a set's contact sheet where people and the report look for a run's pictures."""
    write_atomic(subject.samples_dir / "grid.png", (samples.folder / "grid.png").read_bytes())


def splits_of(spec: RunSpec) -> tuple[str, ...]:
    """The prompts that a run is asked: of combinations seen in training, and of those held out of it."""
    return ("seen", "unseen") if spec.evaluate.geneval_unseen else ("seen",)


def prompts_of(subject: Subject, split: str) -> list[Mapping[str, Any]]:
    """One entry per image of a run's evaluation prompts."""
    return repeated(subject.world.prompts(split), subject.spec.evaluate.geneval_images_per_prompt)


def prompt_drawings(subject: Subject, splits: Sequence[str], detector: Detector) -> list[Drawing]:
    """The images of these splits' prompts; nothing of a split of which the world has none.

    Raises InvalidInput on a prompt that cannot be judged: drawing it would be a waste.
    """
    drawings = [Drawing(subject, split, prompts) for split in splits if (prompts := prompts_of(subject, split))]
    for drawing in drawings:
        check_prompts(drawing.prompts, detector.classes, detector.colors)
    return drawings


def repeated(prompts: Sequence[Mapping[str, Any]], images_per_prompt: int) -> list[Mapping[str, Any]]:
    """One entry per image. A tag with fewer prompts than GenEval's own file gets as many times more images of each."""
    prompts_of = Counter(prompt["tag"] for prompt in prompts)
    times = {tag: images_per_prompt * max(1, PROTOCOL[tag] // n) for tag, n in prompts_of.items()}
    return [prompt for prompt in prompts for _ in range(times[prompt["tag"]])]


def write_results(samples: Samples, verdicts: Sequence[Verdict]) -> None:
    """results.jsonl beside the images, in the official layout."""
    lines = [json.dumps(result_line(row, verdict)) for row, verdict in zip(samples.rows, verdicts, strict=True)]
    write_atomic(samples.folder / "results.jsonl", "".join(line + "\n" for line in lines))


def result_line(row: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """An image's line of results.jsonl: metadata and boxes are JSON inside the JSON, as GenEval writes them."""
    metadata = {key: row[key] for key in ("tag", "include", "exclude", "prompt") if key in row}
    boxes = {cls: [[*d.box, d.score] for d in found] for cls, found in verdict.found.items()}
    line = {"filename": row["file"], "tag": row["tag"], "prompt": row["prompt"], "correct": verdict.correct}
    return line | {"reason": verdict.reason, "metadata": json.dumps(metadata), "details": json.dumps(boxes)}


def bootstrap_se(correct: Sequence[np.ndarray], tags: Sequence[str], repeats: int = 2000) -> float:
    """Standard error of the overall score from drawing prompts anew within each tag (a cluster bootstrap).

    It checks `Rate.se`, which has the same cause in closed form, without its normal approximation.
    """
    rng, overall = np.random.default_rng(0), np.zeros(repeats)
    shares = {tag: np.array([c.mean() for c, t in zip(correct, tags, strict=True) if t == tag]) for tag in set(tags)}
    for tag in sorted(shares):
        drawn = rng.integers(len(shares[tag]), size=(repeats, len(shares[tag])))
        overall += shares[tag][drawn].mean(axis=1) / len(shares)
    return float(overall.std(ddof=1))


def _rate(correct: Sequence[np.ndarray]) -> Rate:
    """The mean over prompts of each prompt's share, with its errors. Raises ValueError when image counts differ."""
    counts = {len(c) for c in correct}
    if len(counts) != 1:
        raise ValueError(f"every prompt of a tag needs the same number of images, got {sorted(counts)}")
    table = np.stack(correct).astype(float)
    (n, k), shares = table.shape, table.mean(axis=1)
    se = float(shares.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    within = float(table.var(axis=1, ddof=1).mean()) / (k * n) if k > 1 else math.nan
    return Rate(float(shares.mean()), se, math.sqrt(within), n, k * n)


def summary_scores(summary: Summary, protocol: str, facts: dict[str, Any]) -> Iterator[Score]:
    """`geneval_<tag>` of every tag, and `geneval`."""
    for tag, rate in summary.tags.items():
        extra = {**facts, "se_seed": rate.se_seed, "prompts": rate.prompts}
        yield rate_score(f"geneval_{tag}", rate, protocol, extra)
    extra = {**facts, **summary.as_json(), "prompts": summary.overall.prompts}
    yield rate_score("geneval", summary.overall, protocol, extra)


def rate_score(name: str, rate: Rate, protocol: str, extra: dict[str, Any]) -> Score:
    """A rate under its metric's name."""
    return Score(Metric(name, "fraction", True), rate.value, rate.se, rate.images, protocol, extra)
