"""Does a model know which of two objects stands where? Without drawing: is a scene likelier under its own caption than
under the opposite one?

    make sweep
    python benchmarks/relations.py runs --sweep local       the table of benchmarks/relations.md

"an apple left of a cat" becomes "an apple right of a cat", for 256 validation scenes with a relation; counted are those
whose training loss, under the same noise, is lower with what they show. A model that has not learned relations is at
.5, a coin's toss, however good its pictures are; a score's position tag tells the two apart only once they are good.
Random order is given four tokens of the image. Runs of the sweep's largest data size, the mean over seeds. Exit code 2
without such runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sampling import subject_of
from fluidscale.evaluate import Subject
from fluidscale.evaluate.validation import fixed_tokens, generator, stack
from fluidscale.folder import RunFolder
from fluidscale.spec import RunSpec
from fluidscale.sweep import load_sweep
from fluidscale.world.captions import RELATIONS, caption
from fluidscale.world.scenes import Scene

SCENES = 256
KNOWN = 4  # tokens that random order is given


def opposite(scene: Scene) -> str:
    """The caption of the scene that this one is not."""
    assert scene.content.relation is not None
    inverse = RELATIONS[RELATIONS.index(scene.content.relation) ^ 1]
    return caption(dataclasses.replace(scene.content, relation=inverse))


@torch.inference_mode()
def share_right(subject: Subject, scenes: list[Scene]) -> float:
    """The share of scenes (n) whose loss is lower under their own caption."""
    model, length = subject.model, subject.spec.model.num_tokens
    encoded = subject.tokenizer.encode(np.stack([subject.world.render(scene) for scene in scenes]))
    tokens = fixed_tokens(subject, encoded, 0)
    if model.order.causal:
        view = stack([model.order.training_view(1, length, generator(k, 0)) for k in range(len(scenes))])
    else:
        ranks = [torch.rand(length, generator=generator(k, 0)).argsort().argsort() for k in range(len(scenes))]
        view = model.order.view(torch.stack(ranks) < KNOWN)
    losses = []
    for captions in ([scene.caption for scene in scenes], [opposite(scene) for scene in scenes]):
        text = subject.source.text(captions).to(subject.device)
        losses.append(model.losses(tokens, text, view, generator(0, 1), stratified=True)[0].sum(1))
    return float((losses[0] < losses[1]).float().mean())


def scenes_of(subject: Subject) -> list[Scene]:
    """The first validation scenes that have a relation."""
    described = subject.world.describe(0, 20 * SCENES, "seen")
    return [scene for scene in described if scene.content.relation][:SCENES]


def chosen(runs: Path, sweep: str) -> list[RunSpec]:
    """The trained runs of the sweep's largest data size."""
    specs = load_sweep(sweep).runs
    most = max(spec.images for spec in specs)
    return [spec for spec in specs if spec.images == most and RunFolder(runs / spec.id).weights.exists()]


def table(shares: dict[tuple[str, str], dict[str, list[float]]]) -> list[str]:
    """A Markdown table of {(arm, how it is told): {size: one share a seed}}."""
    sizes = list(dict.fromkeys(size for row in shares.values() for size in row))
    rows = [f"| arm | positions, text | {' | '.join(sizes)} |", f"|{'---|' * (len(sizes) + 2)}"]
    for (arm, told), row in shares.items():
        cells = (f"{np.mean(row[size]):.2f}" if size in row else "" for size in sizes)
        rows.append(f"| {arm} | {told} | {' | '.join(cells)} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="folder of runs; default: runs")
    parser.add_argument("--sweep", default="local", help="whose runs; default: %(default)s")
    arguments = parser.parse_args()
    specs = chosen(arguments.runs, arguments.sweep)
    if not specs:
        print(f"{arguments.runs}: no trained run of {arguments.sweep}; make sweep SWEEP={arguments.sweep} first")
        return 2
    shares: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for spec in specs:
        subject = subject_of(arguments.runs / spec.id)
        told = f"{spec.model.position}, text from {spec.model.text_init_std:g}"
        shares[spec.arm, told][spec.size].append(share_right(subject, scenes_of(subject)))
    print(f"`python benchmarks/relations.py --sweep {arguments.sweep}`: share of scenes (at .5 +- .03)\n")
    print("\n".join(table(shares)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
