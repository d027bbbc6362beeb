"""Evaluates a trained run again; what was measured before with the same weights costs nothing.

    python -m fluidscale.evaluate runs/ID
    python -m fluidscale.evaluate runs/ID --metrics geneval fd --guidance-scale 1 2 3 5

Scores are kept in RUN_DIR/eval. Another guidance scale or number of steps than the run's own has a folder of its own
there, e.g. eval/guidance_scale=3, and never changes the run's record.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluidscale.spec import InvalidInput

# What depends on how images are drawn: all that is worth measuring again under another guidance scale.
_OF_DRAWING = ("geneval", "fd")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a trained run (runs/ID)")
    parser.add_argument(
        "--metrics", nargs="+", help="val_loss val_nll geneval fd; default: all that the run's spec asks for"
    )
    parser.add_argument("--guidance-scale", nargs="+", type=float, help="one or more; default: the run's own")
    parser.add_argument("--num-inference-steps", type=int, help="autoregressive steps; default: the run's own")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    arguments = parser.parse_args(argv)
    try:
        found = list(_evaluate(arguments))
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if arguments.json else _table(found))
    return 0


def _evaluate(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from fluidscale.data.sources import open_source
    from fluidscale.evaluate import Subject, evaluate
    from fluidscale.folder import RunFolder
    from fluidscale.record import Placement
    from fluidscale.run import device_of, load_trained

    spec, model = load_trained(arguments.run_dir)
    device = device_of(Placement())
    source = open_source(spec, RunFolder(arguments.run_dir).placement, arguments.run_dir.parent, device)
    own = Subject(model.to(device), spec, source, arguments.run_dir, device)
    with _shown() as progress:
        for scale in arguments.guidance_scale or [None]:
            subject = _variant(own, guidance_scale=scale, num_inference_steps=arguments.num_inference_steps)
            which = arguments.metrics or (_OF_DRAWING if subject.variant else None)
            for score in evaluate(subject, which, progress):
                yield {"variant": subject.variant, **dataclasses.asdict(score.metric)} | {
                    key: getattr(score, key) for key in ("value", "se", "n", "protocol")
                }


def _variant(own: Any, **asked: float | None) -> Any:
    """The subject with another way of sampling, named after what differs from the run's own."""
    sampling = own.spec.evaluate.sampling
    changed = {key: value for key, value in asked.items() if value not in (None, getattr(sampling, key))}
    if not changed:
        return own
    evaluation = dataclasses.replace(own.spec.evaluate, sampling=dataclasses.replace(sampling, **changed))
    name = ",".join(f"{key}={value:g}" for key, value in changed.items())
    return dataclasses.replace(own, spec=dataclasses.replace(own.spec, evaluate=evaluation), variant=name)


@contextmanager
def _shown() -> Iterator[Callable[[str, int, int], None]]:
    """Progress with the time left on a terminal; elsewhere a line whenever a phase ends. On stderr, beside --json."""
    if not sys.stderr.isatty():
        yield lambda phase, done, total: print(f"{phase}: {done}", file=sys.stderr) if done == total else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("loading", total=None)

        def show(phase: str, done: int, total: int) -> None:
            bars.update(task, description=phase, completed=done, total=total)

        yield show


def _table(found: list[dict[str, Any]]) -> str:
    lines = []
    for score in found:
        name = f"{score['variant']} {score['name']}".strip()
        lines.append(f"{name:<44} {score['value']:>10.5g} +- {score['se']:<9.2g} {score['unit']:<16} n={score['n']}")
    return "\n".join([*lines, f"protocols: {', '.join(sorted({score['protocol'] for score in found}))}"])


if __name__ == "__main__":
    sys.exit(main())
