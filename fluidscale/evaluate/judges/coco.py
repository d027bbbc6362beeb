"""COCO-30K: the captions that images are drawn for, and the statistics of the real images they are compared with.

    python -m fluidscale.evaluate.judges.coco prompts annotations/captions_val2014.json --out coco30k.jsonl
    python -m fluidscale.evaluate.judges.coco reference val2014/ --inception FILE --out val2014-inception.npz

The protocol: one caption each of 30,000 distinct images of val2014, drawn with seed 0; the reference is all 40,504
validation images, their middle square, Lanczos to 256 px, 8 bits, never through JPEG again. Other lists, references or
resizings give other distances: all of them are in the protocol's name.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fluidscale.evaluate.extract import BATCH, Extractor
from fluidscale.evaluate.judges.reference import Reference, save_reference
from fluidscale.evaluate.judges.scores import prompts_sha256
from fluidscale.evaluate.protocol import Progress, silent
from fluidscale.evaluate.share import Share, share_of_environment
from fluidscale.evaluate.shown import shown
from fluidscale.record import write_atomic
from fluidscale.spec import InvalidInput

PROMPTS, REFERENCE_IMAGES, SIDE, SEED = 30_000, 40_504, 256, 0
RESIZE = "middle square, Lanczos, 8 bits"


def coco_prompts(annotations: Path, count: int = PROMPTS, seed: int = SEED) -> list[dict[str, Any]]:
    """`count` captions of as many distinct images, each {"prompt", "image_id", "caption_id"}; the same everywhere.

    Raises InvalidInput when the file is not COCO's, or has too few images.
    """
    try:
        captions = json.loads(annotations.read_text())["annotations"]
        by_image: dict[int, list[tuple[int, str]]] = {}
        for one in captions:
            by_image.setdefault(one["image_id"], []).append((one["id"], one["caption"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{annotations}: not COCO's captions_val2014.json ({error!r})") from error
    if len(by_image) < count:
        raise InvalidInput(f"{annotations}: {len(by_image)} images with captions, {count} are needed")
    rng, rows = np.random.default_rng(seed), []
    images = sorted(by_image)
    for index in rng.permutation(len(images))[:count].tolist():
        choices = sorted(by_image[images[index]])
        caption_id, text = choices[int(rng.integers(len(choices)))]
        rows.append({"prompt": " ".join(text.split()), "image_id": images[index], "caption_id": caption_id})
    return rows


def squared(image: Image.Image, side: int = SIDE) -> np.ndarray:
    """The middle square of a picture at `side` px, uint8 (side, side, 3)."""
    image = image.convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    image = image.crop((left, top, left + short, top + short))
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def reference(
    folder: Path,
    network: Extractor,
    count: int = REFERENCE_IMAGES,
    share: Share | None = None,
    progress: Progress = silent,
) -> Reference:
    """The real images of a folder through a feature network. Raises InvalidInput unless there are exactly `count`."""
    share = share or Share()
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) != count:
        raise InvalidInput(f"{folder}: {len(paths)} images, the reference has {count}; statistics of fewer are others")
    mine = share.mine(paths)
    features, hashes = [np.zeros((0, network.width), np.float32)], []
    for start in range(0, len(mine), BATCH):
        images = []
        for path in mine[start : start + BATCH]:
            content = path.read_bytes()
            hashes.append(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
            images.append(_read(path, content))
        features.append(network(np.stack(images)))
        progress(f"reference through {network.name}", min((start + len(images)) * share.ranks, count), count)
    content_sha = hashlib.sha256(share.gathered(np.stack(hashes)).tobytes()).hexdigest()
    facts = {"images": folder.name, "images_sha256": content_sha, "n": count, "side": SIDE, "resize": RESIZE}
    facts |= {"extractor": network.name, "extractor_sha256": network.sha256}
    return Reference(share.gathered(np.concatenate(features)), facts)


def _read(path: Path, content: bytes) -> np.ndarray:
    try:
        return squared(Image.open(io.BytesIO(content)))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InvalidInput(f"{path}: not a readable picture") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.evaluate.judges.coco",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("prompts", help="the list of captions to draw")
    listing.add_argument("annotations", type=Path, help="captions_val2014.json")
    listing.add_argument("--count", type=int, default=PROMPTS)
    listing.add_argument("--seed", type=int, default=SEED)
    real = commands.add_parser("reference", help="the statistics of the real images")
    real.add_argument("images", type=Path, help="folder of val2014's images")
    real.add_argument("--count", type=int, default=REFERENCE_IMAGES, help="images that must be there")
    extractor = real.add_mutually_exclusive_group(required=True)
    extractor.add_argument("--inception", type=Path, metavar="FILE", help="torch-fidelity's weights file")
    extractor.add_argument("--dinov2", type=Path, metavar="DIR", help="a local folder in transformers' format")
    real.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for command in (listing, real):
        command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        print(_prompts(arguments) if arguments.command == "prompts" else _reference(arguments))
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _prompts(arguments: argparse.Namespace) -> str:
    rows = coco_prompts(arguments.annotations, arguments.count, arguments.seed)
    write_atomic(arguments.out, "".join(json.dumps(row) + "\n" for row in rows))
    return f"{arguments.out}: {len(rows)} captions, seed {arguments.seed}, sha256 {prompts_sha256(rows)}"


def _reference(arguments: argparse.Namespace) -> str:
    from fluidscale.evaluate.judges.dinov2 import load_dinov2
    from fluidscale.evaluate.judges.inception import load_inception

    load, where = (load_inception, arguments.inception) if arguments.inception else (load_dinov2, arguments.dinov2)
    network = load(where, arguments.device)
    with shown() as progress:
        kept = reference(arguments.images, network, arguments.count, share_of_environment(), progress)
    save_reference(arguments.out, kept)
    return f"{arguments.out}: {len(kept.features)} images through {network.name} {network.sha256[:12]}.."


if __name__ == "__main__":
    sys.exit(main())
