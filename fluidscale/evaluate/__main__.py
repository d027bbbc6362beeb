"""Evaluates a trained run again; what was measured before with the same weights costs nothing.

    python -m fluidscale.evaluate runs/ID
    python -m fluidscale.evaluate runs/ID --metrics geneval fd --guidance-scale 1,2,3,5
    python -m fluidscale.evaluate runs/ID --metrics geneval --images-per-prompt 4        resumed where it was stopped
    python -m fluidscale.evaluate runs/ID --prompts prompts.jsonl --images-per-prompt 4
    python -m fluidscale.evaluate runs/ID --prompts evaluation_metadata.jsonl --detector MASK2FORMER_DIR --clip CLIP_DIR
    python -m fluidscale.evaluate runs/ID --merge FOLDER/scores.json

Scores are kept in RUN_DIR/eval. Another guidance scale, number of steps or of images than the run's own has a folder of
its own there, e.g. eval/guidance_scale=3, and never changes the run's record; of several guidance scales the best of
each metric is named beside the run's own (eval/guidance/sweep.json), and all are drawn in common batches.

--prompts draws the lines of a file as they are, several images each, and judges them where they are GenEval's: by the
detector named, else by that of the run's own world. Images, results.jsonl and scores.json share a folder, for other
judges too (`python -m fluidscale.evaluate.judges --help`); --merge takes back what those found. Stopped anywhere, the
same command goes on with the image that is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluidscale.evaluate.merge import merge
from fluidscale.spec import InvalidInput

# What depends on how images are drawn: all that is worth measuring again under another guidance scale.
_OF_DRAWING = ("geneval", "fd", "fid", "clip_score")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a trained run (runs/ID)")
    parser.add_argument(
        "--metrics", nargs="+", help="val_loss val_nll geneval fd ..; default: all that the run's spec asks for"
    )
    parser.add_argument("--guidance-scale", nargs="+", type=scales, help="one or more, 1,2,3; default: the run's own")
    parser.add_argument("--num-inference-steps", type=int, help="autoregressive steps; default: the run's own")
    parser.add_argument("--images-per-prompt", type=int, help="of GenEval-like prompts; default: the run's own, else 4")
    parser.add_argument("--prompts", type=Path, metavar="JSONL", help="draw and judge these instead of the run's own")
    parser.add_argument("--detector", metavar="NAME|PATH", help="of --prompts: icon detector or Mask2Former DIR")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="of --prompts: Mask2Former's colours")
    parser.add_argument("--merge", type=Path, metavar="JSON", help="take an outside judge's scores into RUN_DIR/eval")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    arguments = parser.parse_args(argv)
    try:
        if arguments.merge:
            print("\n".join(merge(arguments.run_dir, arguments.merge)))
            return 0
        if (arguments.detector or arguments.clip) and not arguments.prompts:
            raise InvalidInput("--detector and --clip judge the images of --prompts; a run's own prompts have theirs")
        found = list(_pose(arguments) if arguments.prompts else _evaluate(arguments))
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    if found:
        print(json.dumps(found, indent=1) if arguments.json else _table(found))
    return 0


def scales(text: str) -> list[float]:
    """One number or several with commas."""
    return [float(part) for part in text.split(",") if part]


def _evaluate(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from fluidscale.evaluate.shown import shown
    from fluidscale.evaluate.suite import chosen, evaluate_all

    own, *subjects = _subjects(arguments)
    drawn = [name for name in _OF_DRAWING if name in {evaluator.name for evaluator in chosen(own, None)}]
    # Where nothing is drawn, naming what could be says so.
    again = arguments.metrics or drawn or _OF_DRAWING
    work = [(one, chosen(one, again if one.variant else arguments.metrics)) for one in subjects]
    by_scale: dict[float, list[Any]] = {}
    with shown() as progress:
        for subject, score in evaluate_all(work, progress):
            by_scale.setdefault(subject.spec.evaluate.sampling.guidance_scale, []).append(score)
            yield _row(subject, score)
    _name_best(arguments, "sweep", own, by_scale)


def _pose(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Draws a prompt file, at each guidance scale, and judges the images where they can be judged."""
    from fluidscale.evaluate.generate import Drawing, draw_all
    from fluidscale.evaluate.judges.scores import keep_scores
    from fluidscale.evaluate.panel import judge_of
    from fluidscale.evaluate.shown import shown
    from fluidscale.world.prompts import check_text, read_prompts

    prompts = read_prompts(arguments.prompts, check_text)
    repeats = 4 if arguments.images_per_prompt is None else arguments.images_per_prompt
    rows = [{"index": index, **prompt} for index, prompt in enumerate(prompts) for _ in range(repeats)]
    own, *subjects = _subjects(arguments)
    judge = judge_of(own, rows, arguments.detector, arguments.clip)
    by_scale: dict[float, list[Any]] = {}
    with shown() as progress:
        drawings = [Drawing(subject, arguments.prompts.stem, rows) for subject in subjects]
        for subject, samples in zip(subjects, draw_all(drawings, progress), strict=True):
            print(samples.folder, file=sys.stderr if arguments.json else sys.stdout)
            scores = list(judge(samples, progress)) if judge else []
            if scores and subject.share.rank == 0:
                keep_scores(samples, scores)
            by_scale.setdefault(subject.spec.evaluate.sampling.guidance_scale, []).extend(scores)
            yield from (_row(subject, score) for score in scores)
    if judge:
        _name_best(arguments, arguments.prompts.stem, own, by_scale)


def _name_best(arguments: argparse.Namespace, name: str, own: Any, by_scale: dict[float, list[Any]]) -> None:
    """Of several guidance scales, says and keeps which was best of each metric."""
    from fluidscale.evaluate.guidance import keep_sweep

    if len(by_scale) > 1 and own.share.rank == 0:
        path = arguments.run_dir / "eval" / "guidance" / f"{name}.json"
        for line in keep_sweep(path, own.spec.evaluate.sampling.guidance_scale, by_scale):
            print(line, file=sys.stderr)


def _row(subject: Any, score: Any) -> dict[str, Any]:
    facts = {key: getattr(score, key) for key in ("value", "se", "n", "protocol")}
    return {"variant": subject.variant, **dataclasses.asdict(score.metric), **facts}


def _subjects(arguments: argparse.Namespace) -> list[Any]:
    """The run as it is, then as it is sampled at each guidance scale; under torchrun, this process's share of it."""
    from fluidscale.data.sources import open_source
    from fluidscale.evaluate import Subject
    from fluidscale.evaluate.share import share_of_environment
    from fluidscale.folder import RunFolder
    from fluidscale.record import Placement
    from fluidscale.run import device_of, load_trained

    if arguments.images_per_prompt is not None and arguments.images_per_prompt < 1:
        raise InvalidInput(f"--images-per-prompt {arguments.images_per_prompt}: must be at least 1")
    spec, model = load_trained(arguments.run_dir)
    device = device_of(Placement())
    placement, share = RunFolder(arguments.run_dir).placement, share_of_environment()
    source = open_source(spec, placement, arguments.run_dir.parent, device)
    own = Subject(model.to(device), spec, source, arguments.run_dir, device, share=share, placement=placement)
    images = None if arguments.prompts else arguments.images_per_prompt
    guidance = [scale for group in arguments.guidance_scale or [[None]] for scale in group]
    steps = arguments.num_inference_steps
    return [own, *(_variant(own, images, guidance_scale=scale, num_inference_steps=steps) for scale in guidance)]


def _variant(own: Any, images_per_prompt: int | None, **asked: float | None) -> Any:
    """The subject with another way of sampling or number of images, named after what differs from the run's own."""
    evaluation = own.spec.evaluate
    changed = {key: value for key, value in asked.items() if value not in (None, getattr(evaluation.sampling, key))}
    names = [f"{key}={value:g}" for key, value in changed.items()]
    evaluation = dataclasses.replace(evaluation, sampling=dataclasses.replace(evaluation.sampling, **changed))
    if images_per_prompt not in (None, evaluation.geneval_images_per_prompt):
        evaluation = dataclasses.replace(evaluation, geneval_images_per_prompt=images_per_prompt)
        names.append(f"images_per_prompt={images_per_prompt}")
    if not names:
        return own
    return dataclasses.replace(own, spec=dataclasses.replace(own.spec, evaluate=evaluation), variant=",".join(names))


def _table(found: list[dict[str, Any]]) -> str:
    lines = []
    for score in found:
        name = f"{score['variant']} {score['name']}".strip()
        lines.append(f"{name:<44} {score['value']:>10.5g} +- {score['se']:<9.2g} {score['unit']:<16} n={score['n']}")
    return "\n".join([*lines, f"protocols: {', '.join(sorted({score['protocol'] for score in found}))}"])


if __name__ == "__main__":
    sys.exit(main())
