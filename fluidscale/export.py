"""A trained run as a folder that draws pictures without it.

    python -m fluidscale.export runs/ID --out folder
    python -m fluidscale.sample folder "two red apples" --out apples.png

The folder holds weights, spec, record and a model card; `fluidscale.pipeline` loads it, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fluidscale.spec import InvalidInput


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder of a trained run (runs/ID)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out.exists() and any(arguments.out.iterdir()):
            raise InvalidInput(f"--out {arguments.out}: there is something in it; name an empty or a new folder")
        from fluidscale.pipeline import FluidPipeline

        FluidPipeline.from_run(arguments.run_dir, device="cpu").save_pretrained(arguments.out)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
