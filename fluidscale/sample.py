"""Pictures from a trained run, or from its exported folder.

    python -m fluidscale.sample runs/ID "two red apples" --num-images 8 --guidance-scale 3 --out grid.png

The same seed gives the same pictures, whatever the batch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fluidscale.spec import InvalidInput


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a trained run (runs/ID), or what fluidscale.export wrote")
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
    import numpy as np
    from rich.progress import Progress

    from fluidscale.evaluate.grid import contact_sheet
    from fluidscale.pipeline import FluidPipeline
    from fluidscale.record import write_atomic

    pipe = FluidPipeline.from_pretrained(arguments.folder)
    with Progress() as progress:
        task = progress.add_task("sampling", total=arguments.num_images)
        drawn = pipe(
            arguments.prompt,
            arguments.num_inference_steps,
            arguments.guidance_scale,
            arguments.num_images,
            [arguments.seed + k for k in range(arguments.num_images)],
            temperature=arguments.temperature,
            progress=lambda done, _: progress.update(task, completed=done),
        )
    images = [np.asarray(image) for image in drawn.images]
    write_atomic(arguments.out, contact_sheet(images, [arguments.prompt] * len(images)))


if __name__ == "__main__":
    sys.exit(main())
