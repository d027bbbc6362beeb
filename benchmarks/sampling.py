"""Which temperature and guidance scale each arm wants: GenEval-protocol score over a grid, on the validation prompts.

    make sweep SWEEP=more_images
    python benchmarks/sampling.py runs --sweep more_images       the tables of benchmarks/sampling.md

Takes each arm's longest run of its largest size and draws the prompts that are kept for choices (the evaluation prompts
are not looked at). The best of a grid is chosen on the very images it is reported on, so beside it stands its lead over
the recipe's own setting, paired by prompt, with 1.96 standard errors; of a dozen equal settings the best leads by more
than one of its standard errors. Exit code 2 without such runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fluidscale.data.sources import open_source
from fluidscale.evaluate import Subject
from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.generate import Drawing, draw_all
from fluidscale.evaluate.geneval import judge_samples, per_prompt, repeated
from fluidscale.evaluate.shown import shown
from fluidscale.folder import RunFolder
from fluidscale.record import Placement
from fluidscale.run import device_of, load_trained
from fluidscale.spec import ARMS
from fluidscale.sweep import load_sweep

TEMPERATURES = (0.6, 0.8, 1.0)
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 4.0)


def chosen(runs: Path, sweep: str) -> list[Path]:
    """Each arm's finished run with the most parameters, of these the one that saw most images."""
    specs = sorted(load_sweep(sweep).runs, key=lambda spec: (spec.model.width, spec.images))
    trained = [spec for spec in specs if RunFolder(runs / spec.id).weights.exists()]
    last = {spec.arm: runs / spec.id for spec in trained}
    return [last[arm] for arm in ARMS if arm in last]


def subject_of(run_dir: Path) -> Subject:
    """A trained run on this machine's device."""
    spec, model = load_trained(run_dir)
    device = device_of(Placement())
    source = open_source(spec, RunFolder(run_dir).placement, run_dir.parent, device)
    return Subject(model.to(device), spec, source, run_dir, device)


def sampled(subject: Subject, **setting: float) -> Subject:
    """The same model, drawn from with another setting."""
    evaluation = subject.spec.evaluate
    changed = dataclasses.replace(evaluation, sampling=dataclasses.replace(evaluation.sampling, **setting))
    return dataclasses.replace(subject, spec=dataclasses.replace(subject.spec, evaluate=changed), variant="sampling")


def scores(
    subject: Subject, grid: Iterable[tuple[float, float]], images_per_prompt: int
) -> dict[tuple[float, float], list[np.ndarray]]:
    """Of each temperature and guidance scale, per tag the share of right images of each prompt."""
    prompts = repeated(subject.world.prompts("seen", part="validation"), images_per_prompt)
    own = subject.spec.evaluate.sampling
    settings = sorted({*grid, (own.temperature, own.guidance_scale)})
    variants = [sampled(subject, temperature=t, guidance_scale=g) for t, g in settings]
    detector, found = load_detector(subject.detector_name, subject.device), {}
    with shown() as progress:
        drawn = draw_all([Drawing(variant, "validation", prompts) for variant in variants], progress)
        for setting, samples in zip(settings, drawn, strict=True):
            right = [verdict.correct for verdict in judge_samples(samples, detector, progress)]
            shares, tags = per_prompt(right, samples.rows)
            by_tag = {
                tag: [s.mean() for s, t in zip(shares, tags, strict=True) if t == tag] for tag in dict.fromkeys(tags)
            }
            found[setting] = [np.array(values) for values in by_tag.values()]
    return found


def mean_of_tags(parts: list[np.ndarray]) -> tuple[float, float]:
    """The unweighted mean over tags and its standard error of the prompts."""
    errors = [part.std(ddof=1) / np.sqrt(len(part)) for part in parts]
    return float(np.mean([part.mean() for part in parts])), float(np.sqrt(np.sum(np.square(errors))) / len(parts))


def table(subject: Subject, found: dict[tuple[float, float], list[np.ndarray]]) -> list[str]:
    """A Markdown table of one arm, temperatures down and guidance across, and its best against the recipe's own."""
    own = subject.spec.evaluate.sampling
    ours = (own.temperature, own.guidance_scale)
    scales = sorted({scale for _, scale in found})
    rows = [f"| {subject.spec.arm} | {' | '.join(f'guidance {scale:g}' for scale in scales)} |"]
    rows.append(f"|{'---|' * (len(scales) + 1)}")
    for temperature in sorted({temperature for temperature, _ in found}):
        cells = []
        for scale in scales:
            value = found.get((temperature, scale))
            text = "" if value is None else "{:.3f} +- {:.3f}".format(*mean_of_tags(value))
            cells.append(f"**{text}**" if (temperature, scale) == ours else text)
        rows.append(f"| temperature {temperature:g} | {' | '.join(cells)} |")
    best = max(found, key=lambda setting: mean_of_tags(found[setting])[0])
    lead, error = mean_of_tags([a - b for a, b in zip(found[best], found[ours], strict=True)])
    rows.append("")
    rows.append(
        f"best at temperature {best[0]:g}, guidance {best[1]:g}: {lead:+.3f} +- {1.96 * error:.3f} on the recipe's"
    )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="folder of runs; default: runs")
    parser.add_argument("--sweep", default="more_images", help="whose runs; default: %(default)s")
    parser.add_argument("--images-per-prompt", type=int, default=1, help="default: %(default)s")
    numbers = {"type": float, "nargs": "+", "metavar": "X"}
    parser.add_argument("--temperature", default=TEMPERATURES, help="default: %(default)s", **numbers)
    parser.add_argument("--guidance-scale", default=GUIDANCE_SCALES, help="default: %(default)s", **numbers)
    arguments = parser.parse_args()
    run_dirs = chosen(arguments.runs, arguments.sweep)
    if not run_dirs:
        print(f"{arguments.runs}: no trained run of {arguments.sweep}; make sweep SWEEP={arguments.sweep} first")
        return 2
    print(f"`python benchmarks/sampling.py --sweep {arguments.sweep}`: GenEval-protocol score, the recipe's in bold")
    for run_dir in run_dirs:
        subject = subject_of(run_dir)
        grid = itertools.product(arguments.temperature, arguments.guidance_scale)
        print("", *table(subject, scores(subject, grid, arguments.images_per_prompt)), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
