"""Which temperature, guidance scale and number of steps each arm wants: GenEval-protocol score over a grid, on the
validation prompts.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluidscale.data.sources import open_source
from fluidscale.evaluate import Subject
from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.generate import Drawing, draw_all
from fluidscale.evaluate.geneval import Rate, judge_samples, per_prompt, repeated, summarise
from fluidscale.evaluate.shown import shown
from fluidscale.folder import RunFolder
from fluidscale.record import Placement
from fluidscale.run import device_of, load_trained
from fluidscale.spec import ARMS
from fluidscale.sweep import load_sweep

TEMPERATURES = (0.6, 0.8, 1.0)
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 4.0)

Setting = tuple[float, int, float]  # temperature, num_inference_steps, guidance_scale


def chosen(runs: Path, sweep: str, arms: Sequence[str]) -> list[Path]:
    """Of each of these arms the finished run with the most parameters, of these the one that saw most images."""
    specs = sorted(load_sweep(sweep).runs, key=lambda spec: (spec.model.width, spec.images))
    trained = [spec for spec in specs if RunFolder(runs / spec.id).weights.exists()]
    last = {spec.arm: runs / spec.id for spec in trained}
    return [last[arm] for arm in arms if arm in last]


def subject_of(run_dir: Path) -> Subject:
    """A trained run on this machine's device."""
    spec, model = load_trained(run_dir)
    device = device_of(Placement())
    source = open_source(spec, RunFolder(run_dir).placement, run_dir.parent, device)
    return Subject(model.to(device), spec, source, run_dir, device)


def sampled(subject: Subject, setting: Setting) -> Subject:
    """The same model, drawn from with another setting."""
    evaluation, (temperature, steps, scale) = subject.spec.evaluate, setting
    sampling = dataclasses.replace(
        evaluation.sampling, temperature=temperature, num_inference_steps=steps, guidance_scale=scale
    )
    changed = dataclasses.replace(evaluation, sampling=sampling)
    return dataclasses.replace(subject, spec=dataclasses.replace(subject.spec, evaluate=changed), variant="sampling")


@dataclass(frozen=True)
class Cell:
    """The images of one setting: an array a prompt of what was right, and each prompt's tag."""

    right: list[np.ndarray]
    tags: list[str]

    @property
    def rate(self) -> Rate:
        return summarise(self.right, self.tags).overall

    def lead(self, other: Cell) -> Rate:
        """The difference in score, paired by prompt, and its standard error of the prompts."""
        pairs = zip(self.right, other.right, strict=True)
        return summarise([a.astype(int) - b for a, b in pairs], self.tags).overall


def cells(subject: Subject, grid: Iterable[Setting], images_per_prompt: int) -> dict[Setting, Cell]:
    """What each setting draws of the prompts that are kept for choices."""
    prompts = repeated(subject.world.prompts("seen", part="validation"), images_per_prompt)
    settings = sorted({*grid, own_setting(subject)})
    variants = [sampled(subject, setting) for setting in settings]
    detector, found = load_detector(subject.detector_name, subject.device), {}
    with shown() as progress:
        drawn = draw_all([Drawing(variant, "validation", prompts) for variant in variants], progress)
        for setting, samples in zip(settings, drawn, strict=True):
            right = [verdict.correct for verdict in judge_samples(samples, detector, progress)]
            found[setting] = Cell(*per_prompt(right, samples.rows))
    return found


def own_setting(subject: Subject) -> Setting:
    """The recipe's."""
    sampling = subject.spec.evaluate.sampling
    return sampling.temperature, sampling.num_inference_steps, sampling.guidance_scale


def table(subject: Subject, found: dict[Setting, Cell]) -> list[str]:
    """A Markdown table of one arm, guidance across and the rest down, and its best against the recipe's own."""
    ours = own_setting(subject)
    scales = sorted({setting[-1] for setting in found})
    rows = [f"| {subject.spec.arm} | {' | '.join(f'guidance {scale:g}' for scale in scales)} |"]
    rows.append(f"|{'---|' * (len(scales) + 1)}")
    for temperature, steps in sorted({setting[:2] for setting in found}):
        texts = []
        for scale in scales:
            cell = found.get((temperature, steps, scale))
            text = "" if cell is None else f"{cell.rate.value:.3f} +- {cell.rate.se:.3f}"
            texts.append(f"**{text}**" if (temperature, steps, scale) == ours else text)
        rows.append(f"| temperature {temperature:g}, {steps} steps | {' | '.join(texts)} |")
    best = max(found, key=lambda setting: found[setting].rate.value)
    lead = found[best].lead(found[ours])
    said = f"best at temperature {best[0]:g}, {best[1]} steps, guidance {best[2]:g}: "
    return [*rows, "", f"{said}{lead.value:+.3f} +- {1.96 * lead.se:.3f} on the recipe's"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="folder of runs; default: runs")
    parser.add_argument("--sweep", default="more_images", help="whose runs; default: %(default)s")
    parser.add_argument("--images-per-prompt", type=int, default=1, help="default: %(default)s")
    numbers = {"type": float, "nargs": "+", "metavar": "X"}
    parser.add_argument("--temperature", default=TEMPERATURES, help="default: %(default)s", **numbers)
    parser.add_argument("--guidance-scale", default=GUIDANCE_SCALES, help="default: %(default)s", **numbers)
    parser.add_argument("--num-inference-steps", type=int, nargs="+", metavar="N", help="default: the recipe's")
    parser.add_argument("--arm", choices=ARMS, help="default: all four")
    arguments = parser.parse_args()
    run_dirs = chosen(arguments.runs, arguments.sweep, [arguments.arm] if arguments.arm else ARMS)
    if not run_dirs:
        print(f"{arguments.runs}: no trained run of {arguments.sweep}; make sweep SWEEP={arguments.sweep} first")
        return 2
    print(f"`python benchmarks/sampling.py --sweep {arguments.sweep}`: GenEval-protocol score, the recipe's in bold")
    for run_dir in run_dirs:
        subject = subject_of(run_dir)
        steps = arguments.num_inference_steps or [subject.spec.evaluate.sampling.num_inference_steps]
        grid = itertools.product(arguments.temperature, steps, arguments.guidance_scale)
        print("", *table(subject, cells(subject, grid, arguments.images_per_prompt)), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
