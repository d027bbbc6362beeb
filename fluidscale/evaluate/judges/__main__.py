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

import torch

from fluidscale.evaluate.judges.clip import ColorClassifier, load_clip
from fluidscale.evaluate.judges.coco import PROMPTS
from fluidscale.evaluate.judges.dinov2 import load_dinov2
from fluidscale.evaluate.judges.inception import load_inception
from fluidscale.evaluate.judges.mask2former import load_mask2former
from fluidscale.evaluate.judges.official import check_official, official_geneval
from fluidscale.evaluate.judges.reference import load_reference
from fluidscale.evaluate.judges.scores import as_line, clip_score, coco_distances, keep_scores
from fluidscale.evaluate.judges.selftest import clip_golden, detector_golden, features_golden, self_tested
from fluidscale.evaluate.protocol import Progress, Score
from fluidscale.evaluate.samples import read_samples
from fluidscale.evaluate.share import Share, share_of_environment
from fluidscale.evaluate.shown import shown
from fluidscale.spec import InvalidInput


def judged(arguments: argparse.Namespace, share: Share, progress: Progress) -> Iterator[Score]:
    """Every score that the given networks allow. Everything is checked before anything is spent."""
    samples = read_samples(arguments.folder)
    samples.check_complete()
    if sum(map(bool, (arguments.inception, arguments.dinov2))) != bool(arguments.reference):
        raise InvalidInput("--reference goes with one of --inception and --dinov2: the network that made it")
    if arguments.detector and not arguments.clip:
        raise InvalidInput("--detector needs --clip: GenEval's colours are CLIP's")
    clip = self_tested(load_clip, clip_golden, arguments.clip, arguments.device) if arguments.clip else None
    if clip:
        print(f"clip {clip.sha256}", file=sys.stderr)
    if arguments.detector:
        check_official(samples.rows)
        detector = self_tested(load_mask2former, detector_golden, arguments.detector, arguments.device)
        print(f"detector {detector.sha256}", file=sys.stderr)
        assert clip is not None
        yield from official_geneval(samples, detector, ColorClassifier(clip), clip.sha256, share, progress)
    elif clip:
        yield clip_score(samples, clip, share, progress)
    for load, where in ((load_inception, arguments.inception), (load_dinov2, arguments.dinov2)):
        if where:
            network = self_tested(load, features_golden, where, arguments.device)
            print(f"{network.name} {network.sha256}", file=sys.stderr)
            reference = load_reference(arguments.reference, network)
            yield from coco_distances(samples, network, reference, arguments.count, share, progress)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.evaluate.judges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images and prompts.jsonl, or GenEval's layout")
    parser.add_argument(
        "--detector", type=Path, metavar="DIR", help="Mask2Former; the module `judges.convert` makes it"
    )
    parser.add_argument("--clip", type=Path, metavar="DIR", help="CLIP ViT-L/14; without --detector: CLIPScore")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="torch-fidelity's weights file: FID")
    parser.add_argument("--dinov2", type=Path, metavar="DIR", help="DINOv2: FD-DINOv2")
    parser.add_argument("--reference", type=Path, metavar="NPZ", help="what the module `judges.coco` wrote")
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
            entries = keep_scores(read_samples(arguments.folder), found)
            print(json.dumps(entries, indent=1) if arguments.json else "\n".join(map(as_line, found)))
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
