"""Tokenizers: which are shipped, and how good one is on a folder of images.

    python -m fluidscale.tokens                                          the shipped ones and their quality
    python -m fluidscale.tokens sd-vae --images coco/val2014             PSNR, reconstruction FD, codes used
    python -m fluidscale.tokens vq_ds16_t2i.pt --convert llamagen-vq16   LlamaGen's checkpoint to a folder, once

A tokenizer is a folder of diffusers (AutoencoderKL, VQModel) or transformers (JanusVQVAE), a shipped name, or the path
of one's own .safetensors. An optional fluidscale.json in a folder sets {"resolution": 256, "group": 2, "posterior":
"sample"}: `group` x `group` latents become one token; models learn from posterior samples or from the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fluidscale.spec import InvalidInput

COLUMNS = ("name", "kind", "resolution", "grid", "channels", "vocab_size", "psnr", "fd_floor", "sha256")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", nargs="?", metavar="FOLDER", help="without it the shipped ones are listed")
    parser.add_argument("--images", type=Path, help="folder of images, searched to any depth")
    parser.add_argument("--limit", type=int, default=2048, help="images to measure on; default: %(default)s")
    parser.add_argument("--features", default="icons32-features", help="network of the Fréchet distance: a shipped "
                        "one, or the path of its .safetensors; default: %(default)s")  # fmt: skip
    parser.add_argument("--convert", type=Path, metavar="OUT", help="LlamaGen's .pt file to a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        rows = list(_answer(arguments))
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(rows if arguments.tokenizer is None else rows[0], indent=1))
    else:
        _print(rows)
    return 0


def _answer(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if arguments.tokenizer is None:
        from fluidscale.tokens.shipped import shipped_cards

        cards = shipped_cards().items()
        yield from ({"name": name, **card} for name, card in cards if card["kind"] in ("continuous", "discrete"))
    elif arguments.convert is not None:
        from fluidscale.tokens.llamagen import convert

        convert(Path(arguments.tokenizer), arguments.convert)
        yield _facts(str(arguments.convert), arguments.device)
    else:
        facts = _facts(arguments.tokenizer, arguments.device)
        yield facts | (_measured(arguments) if arguments.images else {})


def _facts(name: str, device: str) -> dict[str, Any]:
    """A tokenizer that loads, in a few words."""
    from fluidscale.tokens.image import load_tokenizer

    tokenizer = load_tokenizer(name, device)
    facts = ("kind", "resolution", "grid", "channels", "vocab_size", "sha256")
    return {"name": Path(name).name} | {fact: getattr(tokenizer, fact) for fact in facts}


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from fluidscale.data.datasets import IMAGES
    from fluidscale.evaluate.distances import moments
    from fluidscale.evaluate.features import load_features
    from fluidscale.evaluate.fid import with_error
    from fluidscale.tokens.image import load_tokenizer
    from fluidscale.tokens.quality import code_use, psnrs

    paths = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in IMAGES)[: arguments.limit]
    if len(paths) < 2:
        raise InvalidInput(
            f"{arguments.images}: {len(paths)} images ({', '.join(IMAGES)}) there; at least 2 are needed"
        )
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.device)
    network = load_features(arguments.features, arguments.device)
    quality, real, drawn, tokens = [], [], [], []
    rejected: list[dict[str, str]] = []
    for images in _batches(paths, tokenizer.resolution, rejected):
        tokens.append(tokenizer.encode(images))
        # As models learn them: continuous tokens are drawn from the posterior.
        through = tokenizer.decode(tokenizer.sample(tokens[-1], torch.Generator().manual_seed(0)))
        quality.append(psnrs(images, through))
        real.append(network(images))
        drawn.append(network(through))
    per_image = np.concatenate(quality)
    # Against the very images that went in: what is left is the tokens' loss, not the draw of images.
    fd, fd_se = with_error(np.concatenate(drawn), moments(np.concatenate(real)))
    found = {"images": len(per_image), "unreadable": len(rejected), "psnr": float(per_image.mean())}
    found |= {"psnr_se": float(per_image.std(ddof=1) / np.sqrt(len(per_image)))}
    found |= {"reconstruction_fd": fd, "reconstruction_fd_se": fd_se}
    found |= {"features": network.name, "features_sha256": network.sha256}
    if tokenizer.kind == "discrete":
        return found | code_use(torch.cat(tokens), tokenizer.vocab_size)
    mean, deviation = torch.cat(tokens).chunk(2, dim=-1)
    # What a diffusion head sees: its noise schedule is made for a deviation of 1.
    return found | {"latent_deviation": float((mean.var() + (deviation**2).mean()).sqrt())}


def _batches(paths: list[Path], resolution: int, rejected: list[dict[str, str]]) -> Iterator[np.ndarray]:
    """uint8 (B, R, R, 3) of what is readable, with progress."""
    from fluidscale.data.datasets import Item
    from fluidscale.data.encoding import read
    from fluidscale.progress import counted

    items = (Item(path.name, path.read_bytes, ("",)) for path in paths)
    with counted("measuring", len(paths), "images") as done:
        for rows in read(items, resolution, rejected, done):
            yield np.stack([row.pixels for row in rows])


def _print(rows: list[dict[str, Any]]) -> None:
    if len(rows) == 1:
        for name, value in rows[0].items():
            print(f"{name:<22}{value:.4g}" if isinstance(value, float) else f"{name:<22}{value}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for row in rows:
        values = [row.get(name, "") for name in COLUMNS]
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v)[:12] if k == "sha256" else str(v)
                        for k, v in zip(COLUMNS, values, strict=True)))  # fmt: skip
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    sys.exit(main())
