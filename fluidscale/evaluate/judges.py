"""Judges a folder of images with published networks: GenEval, FID on COCO-30K, FD-DINOv2, CLIPScore.

    python -m fluidscale.evaluate.judges runs/ID/samples/official-3f1c --detector MASK2FORMER_DIR --clip CLIP_DIR
    python -m fluidscale.evaluate.judges FOLDER --inception FILE --reference val2014-inception.npz
    torchrun --nproc-per-node 8 -m fluidscale.evaluate.judges FOLDER ..          each image on one process

FOLDER is what `python -m fluidscale.evaluate RUN_DIR --prompts ..` drew, or GenEval's own layout. Nothing is fetched:
every network is a local file or folder. Scores are kept in FOLDER/scores.json, with what was measured and by whom;
`python -m fluidscale.evaluate RUN_DIR --merge FOLDER/scores.json` puts them beside the run's other scores. A judgement
that was stopped goes on where it was; a second one costs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fluidscale.evaluate.clip import ColorClassifier, clip_scores, load_clip
from fluidscale.evaluate.coco import PROMPTS, load_reference, prompts_sha256
from fluidscale.evaluate.dinov2 import load_dinov2
from fluidscale.evaluate.distances import moments
from fluidscale.evaluate.extract import BATCH, Extractor, features_of
from fluidscale.evaluate.fid import distances, with_error
from fluidscale.evaluate.inception import load_inception
from fluidscale.evaluate.mask2former import load_mask2former
from fluidscale.evaluate.official import check_official, official_geneval
from fluidscale.evaluate.protocol import Metric, Progress, Score, protocol_id
from fluidscale.evaluate.samples import DRAWING, Samples, read_samples
from fluidscale.evaluate.selftest import check_golden, clip_golden, detector_golden
from fluidscale.evaluate.share import Share, share_of_environment
from fluidscale.evaluate.shown import shown
from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput

SCORES = "scores.json"


def judged(arguments: argparse.Namespace, share: Share, progress: Progress) -> Iterator[Score]:
    """Every score that the given networks allow. Everything is checked before anything is spent."""
    samples = read_samples(arguments.folder)
    samples.check_complete()
    if sum(map(bool, (arguments.inception, arguments.dinov2))) != bool(arguments.reference):
        raise InvalidInput("--reference goes with one of --inception and --dinov2: the network that made it")
    if arguments.detector and not arguments.clip:
        raise InvalidInput("--detector needs --clip: GenEval's colours are CLIP's")
    clip = load_clip(arguments.clip, arguments.device) if arguments.clip else None
    if clip:
        check_golden(arguments.clip, clip.sha256, clip_golden(clip), lambda: clip_golden(load_clip(arguments.clip)))
        print(f"clip {clip.sha256}", file=sys.stderr)
    if arguments.detector:
        check_official(samples.rows)
        where = arguments.detector
        detector = load_mask2former(where, arguments.device)
        check_golden(
            where, detector.sha256, detector_golden(detector), lambda: detector_golden(load_mask2former(where))
        )
        print(f"detector {detector.sha256}", file=sys.stderr)
        assert clip is not None
        yield from official_geneval(samples, detector, ColorClassifier(clip), clip.sha256, share, progress)
    elif clip:
        yield clip_score(samples, clip, share, progress)
    if arguments.inception:
        yield from coco_distances(
            samples, load_inception(arguments.inception, arguments.device), arguments, share, progress
        )
    if arguments.dinov2:
        yield from coco_distances(samples, load_dinov2(arguments.dinov2, arguments.device), arguments, share, progress)


def coco_distances(
    samples: Samples, network: Extractor, arguments: argparse.Namespace, share: Share, progress: Progress
) -> Iterator[Score]:
    """`fid_inf`, kid, precision, recall and `fid` with Inception; `fd_inf` and `fd` with another network."""
    reference = load_reference(arguments.reference, network)
    if (n := len(samples.rows)) != arguments.count:
        raise InvalidInput(f"{samples.folder}: {n} prompts, the protocol has {arguments.count}; FID depends on n")
    if (shape := next(samples.batches(1)).shape[1:3]) != (side := reference.facts["side"],) * 2:
        raise InvalidInput(
            f"{samples.folder}: images of {shape[1]} x {shape[0]} px, the reference's are {side} x {side}"
        )
    drawing = read_json(samples.folder / DRAWING) or {}
    guidance = drawing.get("sampling", {}).get("guidance_scale")
    facts = {
        "reference": reference.facts,
        "prompts_sha256": prompts_sha256(samples.rows),
        "sampling": drawing.get("sampling"),
    }
    protocol = protocol_id(f"coco{n // 1000}k-{network.name}-g{guidance}", **facts)
    facts |= {"images_sha256": samples.sha256}
    drawn = features_of(samples, network, samples.folder, share, progress)
    if network.name == "inception":
        yield from distances("fid", drawn, reference.features, network.name, protocol, facts)
        return
    for name, unbiased in (("fd_inf", True), ("fd", False)):
        value, se = with_error(drawn, moments(reference.features), unbiased)
        yield Score(Metric(name, f"FD-{network.name}", False), value, se, n, protocol, facts)


def clip_score(samples: Samples, clip: Any, share: Share, progress: Progress) -> Score:
    """`clip_score`: the mean over images of max(100 cos(image, prompt), 0)."""
    mine, parts, done = samples.part(share.rank, share.ranks), [], 0
    for images in mine.batches(BATCH):
        texts = [row["prompt"] for row in mine.rows[done : done + len(images)]]
        parts.append(clip_scores(clip, images, texts))
        done += len(images)
        progress("CLIPScore", min(done * share.ranks, len(samples.rows)), len(samples.rows))
    scores = share.gathered(np.concatenate([np.zeros(0), *parts]))
    facts = {"clip_sha256": clip.sha256, "prompts_sha256": prompts_sha256(samples.rows)}
    n = len(scores)
    se = float(scores.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    extra = facts | {"images_sha256": samples.sha256}
    metric = Metric("clip_score", "100 cos", True)
    return Score(metric, float(scores.mean()), se, n, protocol_id(f"clip-score-n{n}", **facts), extra)


def as_entry(score: Score, samples: Samples) -> dict[str, Any]:
    """A score as one entry of scores.json, the form in which any outside judge may hand its numbers back."""
    metric = score.metric
    entry = {"metric": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better}
    entry |= {key: getattr(score, key) for key in ("value", "se", "n", "protocol", "extra")}
    return entry | {"images_sha256": samples.sha256}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.evaluate.judges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images and prompts.jsonl, or GenEval's layout")
    parser.add_argument("--detector", type=Path, metavar="DIR", help="Mask2Former, see fluidscale.evaluate.convert")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="CLIP ViT-L/14; without --detector: CLIPScore")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="torch-fidelity's weights file: FID")
    parser.add_argument("--dinov2", type=Path, metavar="DIR", help="DINOv2: FD-DINOv2")
    parser.add_argument("--reference", type=Path, metavar="NPZ", help="what `fluidscale.evaluate.coco reference` wrote")
    parser.add_argument("--count", type=int, default=PROMPTS, help="images of the FID protocol (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    arguments = parser.parse_args(argv)
    try:
        share = share_of_environment()
        with shown() as progress:
            found = list(judged(arguments, share, progress))
        if not found:
            raise InvalidInput("nothing to measure: give --detector and --clip, --clip, --inception or --dinov2")
        if share.rank == 0:
            _keep(arguments, found)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _keep(arguments: argparse.Namespace, found: list[Score]) -> None:
    samples = read_samples(arguments.folder)
    entries = [as_entry(score, samples) for score in found]
    path = arguments.folder / SCORES
    fresh = {(entry["metric"], entry["protocol"]) for entry in entries}
    # Of other judges, on these same images.
    older = (read_json(path) or {"scores": []})["scores"]
    kept = [e for e in older if e["images_sha256"] == samples.sha256 and (e["metric"], e["protocol"]) not in fresh]
    write_json(path, {"scores": [*kept, *entries]})
    if arguments.json:
        print(json.dumps(entries, indent=1))
        return
    for score in found:
        name, unit = score.metric.name, score.metric.unit
        print(f"{name:<24} {score.value:>10.5g} +- {score.se:<9.2g} {unit:<16} n={score.n}  {score.protocol}")


if __name__ == "__main__":
    sys.exit(main())
