"""What published networks say of a folder of images: distances to a reference, CLIPScore, GenEval."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fluidscale.evaluate.distances import moments
from fluidscale.evaluate.extract import BATCH, Extractor, features_of
from fluidscale.evaluate.fid import distances, too_few, with_error
from fluidscale.evaluate.judges.clip import clip_scores
from fluidscale.evaluate.judges.reference import Reference
from fluidscale.evaluate.protocol import Metric, Progress, Score, protocol_id
from fluidscale.evaluate.samples import DRAWING, Samples
from fluidscale.evaluate.share import Share
from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput

SCORES = "scores.json"


def prompts_sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    """Names a list of prompts by its texts, in order."""
    return hashlib.sha256("\n".join(row["prompt"] for row in rows).encode()).hexdigest()


def coco_distances(
    samples: Samples, network: Extractor, reference: Reference, count: int, share: Share, progress: Progress
) -> Iterator[Score]:
    """`fid_inf`, kid, precision, recall and `fid` with Inception; `fd_inf` and `fd` with another network.

    Raises InvalidInput unless there are `count` images of the reference's size.
    """
    if (n := len(samples.rows)) != count:
        raise InvalidInput(f"{samples.folder}: {n} prompts, the protocol has {count}; FID depends on n")
    if (shape := next(samples.batches(1)).shape[1:3]) != (side := reference.facts["side"],) * 2:
        raise InvalidInput(
            f"{samples.folder}: images of {shape[1]} x {shape[0]} px, the reference's are {side} x {side}"
        )
    sampling = (read_json(samples.folder / DRAWING) or {}).get("sampling")
    protocol, facts = coco_protocol(network.name, samples.rows, reference.facts, sampling)
    facts |= {"images_sha256": samples.sha256}
    drawn = features_of(samples, network, samples.folder, share, progress)
    if network.name == "inception":
        yield from distances("fid", drawn, reference.features, network.name, protocol, facts)
        return
    if refusal := too_few(drawn):
        facts["fd_inf_refused"] = refusal
    for name, unbiased in (("fd", False),) if refusal else (("fd_inf", True), ("fd", False)):
        value, se = with_error(drawn, moments(reference.features), unbiased)
        yield Score(Metric(name, f"FD-{network.name}", False), value, se, n, protocol, facts)


def coco_protocol(
    network: str, rows: Sequence[Mapping[str, Any]], reference: dict[str, Any], sampling: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """How images of `rows` are compared with a reference, and the facts behind that name.

    How they were drawn is among the facts and not in the name: the paper gives each arm a guidance and a temperature of
    its own, and compares them.
    """
    facts = {"reference": reference, "prompts_sha256": prompts_sha256(rows)}
    return protocol_id(f"coco{len(rows) // 1000}k-{network}", **facts), {**facts, "sampling": sampling}


def clip_score(samples: Samples, clip: Any, share: Share, progress: Progress) -> Score:
    """`clip_score`: the mean over images of max(100 cos(image, prompt), 0)."""
    mine, parts, done = samples.part(share.rank, share.ranks), [], 0
    for images in mine.batches(BATCH):
        texts = [row["prompt"] for row in mine.rows[done : done + len(images)]]
        parts.append(clip_scores(clip, images, texts))
        done += len(images)
        progress("CLIPScore", min(done * share.ranks, len(samples.rows)), len(samples.rows))
    scores = share.gathered(np.concatenate([np.zeros(0), *parts]))
    protocol, facts = clip_protocol(samples.rows, clip.sha256)
    n = len(scores)
    se = float(scores.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    extra = facts | {"images_sha256": samples.sha256}
    metric = Metric("clip_score", "100 cos", True)
    return Score(metric, float(scores.mean()), se, n, protocol, extra)


def clip_protocol(rows: Sequence[Mapping[str, Any]], clip_sha256: str) -> tuple[str, dict[str, Any]]:
    """How a CLIPScore of `rows` is measured, and the facts behind that name."""
    facts = {"clip_sha256": clip_sha256, "prompts_sha256": prompts_sha256(rows)}
    return protocol_id(f"clip-score-n{len(rows)}", **facts), facts


def keep_scores(samples: Samples, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Writes scores.json beside the images, the form in which any outside judge may hand its numbers back.

    What other judges, or other protocols, said of these same images stays. Returns the entries of `scores`.
    """
    keys = ("value", "se", "n", "protocol", "extra")
    entries = [
        {"metric": score.metric.name, "unit": score.metric.unit, "higher_is_better": score.metric.higher_is_better}
        | {key: getattr(score, key) for key in keys}
        | {"images_sha256": samples.sha256}
        for score in scores
    ]
    path, fresh = samples.folder / SCORES, {(entry["metric"], entry["protocol"]) for entry in entries}
    older = (read_json(path) or {"scores": []})["scores"]
    kept = [e for e in older if e["images_sha256"] == samples.sha256 and (e["metric"], e["protocol"]) not in fresh]
    write_json(path, {"scores": [*kept, *entries]})
    return entries


def as_line(score: Score) -> str:
    """A score for people."""
    name, unit = score.metric.name, score.metric.unit
    return f"{name:<24} {score.value:>10.5g} +- {score.se:<9.2g} {unit:<16} n={score.n}  {score.protocol}"
