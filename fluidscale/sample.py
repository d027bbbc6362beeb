"""Pictures from a trained run.

    python -m fluidscale.sample runs/ID "two red apples" --num-images 8 --guidance-scale 3 --out grid.png

The same seed gives the same pictures, whatever the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from fluidscale.spec import InvalidInput

BATCH = 64


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder of a trained run (runs/ID)")
    parser.add_argument(
        "prompt", help='what to draw, in words the run was trained on, e.g. "a red apple and a blue car"'
    )
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, help="default: the run's own evaluation setting")
    parser.add_argument("--temperature", type=float, help="default: the run's own evaluation setting")
    parser.add_argument("--num-inference-steps", type=int, help="autoregressive steps; raster order takes one a token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    arguments = parser.parse_args(argv)
    try:
        _sample(arguments)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


def _sample(arguments: argparse.Namespace) -> None:
    if arguments.num_images < 1:
        raise InvalidInput(f"--num-images {arguments.num_images}: must be at least 1")
    from rich.progress import Progress

    from fluidscale.data.sources import open_source
    from fluidscale.evaluate.grid import contact_sheet
    from fluidscale.folder import RunFolder
    from fluidscale.model.generator import generate
    from fluidscale.record import Placement, write_atomic
    from fluidscale.run import device_of, load_trained

    spec, model = load_trained(arguments.run_dir)
    device = device_of(Placement())
    model = model.to(device)
    asked = {
        key: value
        for key in ("guidance_scale", "temperature", "num_inference_steps")
        if (value := getattr(arguments, key)) is not None
    }
    sampling = dataclasses.replace(spec.evaluate.sampling, **asked)
    source = open_source(spec, RunFolder(arguments.run_dir).placement, arguments.run_dir.parent, device)
    images = []
    with Progress() as progress:
        task = progress.add_task("sampling", total=arguments.num_images)
        for first in range(0, arguments.num_images, BATCH):
            seeds = [arguments.seed + k for k in range(first, min(first + BATCH, arguments.num_images))]
            text = source.text([arguments.prompt] * len(seeds))
            images.extend(source.tokenizer.decode(generate(model, text, sampling, seeds)))
            progress.advance(task, len(seeds))
    write_atomic(arguments.out, contact_sheet(images, [arguments.prompt] * len(images)))


if __name__ == "__main__":
    sys.exit(main())
