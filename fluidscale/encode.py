"""Images and captions to token shards, once, for every run that trains on them.

    python -m fluidscale.encode coco/val2014 --captions captions_val2014.json \\
        --tokenizer sd-vae --text-encoder t5-xxl --out shards/coco-vae

DATASET is a folder of images (with --captions in COCO's form), a CSV, TSV or parquet table with columns `image` and
`caption`, or a folder of WebDataset tars. Stopped at any moment, the same command goes on where it was; on finished
shards it checks every byte. Under SLURM each task takes its share, and the last one writes the manifest:

    srun bash -c 'python -m fluidscale.encode ... --shard $SLURM_PROCID/$SLURM_NTASKS'

Each image is set upright, laid over white, cut to its centre square and resized to what the tokenizer takes (Lanczos).
What cannot be read is listed in SHARDS/rejected.jsonl; images of equal bytes are kept once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluidscale.spec import InvalidInput


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder of images, table of paths, or tars")
    parser.add_argument("--captions", type=Path, help="COCO's captions JSON of a folder of images")
    parser.add_argument("--allow-missing", action="store_true", help="leave out captions whose image is not there")
    parser.add_argument("--tokenizer", required=True, help="folder (AutoencoderKL, VQModel, JanusVQVAE), or our own")
    parser.add_argument("--text-encoder", type=Path, required=True, help="folder of a T5 or BERT encoder")
    parser.add_argument("--text-dtype", default="bfloat16", help="bfloat16 (T5's) or float32; default: %(default)s")
    parser.add_argument("--text-length", type=int, default=128, help="longest caption in tokens; default: %(default)s")
    parser.add_argument("--text-features", choices=("cached", "live"), default="cached",
                        help="cached: features are kept in the shards; live: token ids only, the encoder runs while "
                             "training; default: %(default)s")  # fmt: skip
    parser.add_argument("--val-images", type=int, default=1024, help="set aside for validation; default: %(default)s")
    parser.add_argument("--rows-per-part", type=int, default=10_000, help="images of a part, the unit that a stop can "
                        "cost; tars are parts as they are; default: %(default)s")  # fmt: skip
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="this task's share of the parts, I from 0")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine, each with its share")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps; workers take one GPU each; default: cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS")
    arguments = parser.parse_args(argv)
    try:
        print(_encode(arguments))
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _encode(arguments: argparse.Namespace) -> str:
    from fluidscale.data.captioned import MANIFEST, file_sha256, verify
    from fluidscale.data.encoding import begin, finish

    share, shares = _share(arguments)
    dataset = _dataset(arguments)
    # One worker's networks are loaded here; several load their own, after these have shown that the folders are good.
    encoder = _encoder(arguments, arguments.device)
    recipe = encoder.recipe(dataset, arguments.val_images)
    begin(arguments.out, recipe)
    manifest = arguments.out / MANIFEST
    if manifest.exists():
        verify(arguments.out)
        return f"{manifest}: complete, every byte checked, sha256 {file_sha256(manifest)}"
    mine = range(share, len(dataset.parts), shares)
    if arguments.workers == 1:
        with _shown(dataset, mine) as done:
            _work(arguments.out, dataset, mine, encoder, done)
    else:
        _spawn(arguments, dataset, share, shares)
    found = finish(arguments.out, recipe)
    if found is None:
        return f"{arguments.out}: this share is done; the last of the others writes {MANIFEST}"
    counts = ", ".join(f"{count} {name}" for name, count in found["splits"].items())
    left_out = f"{found['duplicates']} duplicates and {found['rejected']} unreadable left out"
    return f"{manifest}: {counts}; {left_out}; sha256 {file_sha256(manifest)}"


def _share(arguments: argparse.Namespace) -> tuple[int, int]:
    index, _, count = arguments.shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)) or arguments.workers < 1:
        raise InvalidInput(f"--shard {arguments.shard} --workers {arguments.workers}: expected I/N, I < N, e.g. 0/4")
    return int(index), int(count)


def _dataset(arguments: argparse.Namespace) -> Any:
    from fluidscale.data.datasets import open_dataset

    if arguments.rows_per_part < 1 or arguments.val_images < 0 or arguments.text_length < 1:
        raise InvalidInput("--rows-per-part and --text-length must be at least 1, --val-images at least 0")
    return open_dataset(arguments.dataset, arguments.captions, arguments.rows_per_part, arguments.allow_missing)


def _encoder(arguments: argparse.Namespace, device: str) -> Any:
    from fluidscale.data.encoding import Encoder
    from fluidscale.tokens.image import load_tokenizer
    from fluidscale.tokens.text import TextEncoder

    text = TextEncoder(arguments.text_encoder, arguments.text_dtype, arguments.text_length, device)
    return Encoder(load_tokenizer(arguments.tokenizer, device), text, arguments.text_features)


def _work(out: Path, dataset: Any, parts: range, encoder: Any, done: Callable[[int], None]) -> None:
    from fluidscale.data.encoding import encode_part

    for index in parts:
        encode_part(out, index, dataset.parts[index](), encoder, done)


def _spawn(arguments: argparse.Namespace, dataset: Any, share: int, shares: int) -> None:
    """Workers as processes of their own; the images that they have been through are counted together."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    count = shares * arguments.workers
    with _shown(dataset, range(share, len(dataset.parts), shares)) as done:
        workers = [
            context.Process(target=_worker, args=(arguments, share + shares * k, count, k, counter), daemon=True)
            for k in range(arguments.workers)
        ]
        for worker in workers:
            worker.start()
        seen = 0
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.5)
            done(counter.value - seen)
            seen = counter.value
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise InvalidInput(f"{len(failed)} of {len(workers)} workers failed (see above); the same command goes on")


def _worker(arguments: argparse.Namespace, share: int, shares: int, local: int, counter: Any) -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.workers))
    several = arguments.device == "cuda" and torch.cuda.device_count() > 1
    device = f"cuda:{local % torch.cuda.device_count()}" if several else arguments.device
    dataset = _dataset(arguments)

    def done(images: int) -> None:
        with counter.get_lock():
            counter.value += images

    _work(arguments.out, dataset, range(share, len(dataset.parts), shares), _encoder(arguments, device), done)


def _shown(dataset: Any, parts: range) -> Any:
    """Progress in images with the time left: a bar on a terminal, else a line every ten seconds."""
    from fluidscale.progress import counted

    total = None if dataset.images is None else -(-dataset.images * len(parts) // len(dataset.parts))
    return counted("encoding", total, "images")


if __name__ == "__main__":
    sys.exit(main())
