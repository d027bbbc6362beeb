"""GenEval itself: the official prompts, its Mask2Former and CLIP, on a folder of 553 x k images.

The rules are those of `rules`, which also judge the icon world; here are only what is official about it: that nothing
may be missing, and how a long judgement goes on where it was stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fluidscale.evaluate.geneval import bootstrap_se, judge_images, per_prompt, rate_score, result_line, summarise
from fluidscale.evaluate.protocol import Detection, Detector, Progress, Score, protocol_id, silent
from fluidscale.evaluate.rules import check_prompts
from fluidscale.evaluate.samples import Samples
from fluidscale.evaluate.share import Share
from fluidscale.record import write_atomic
from fluidscale.spec import InvalidInput
from fluidscale.world.prompts import PROTOCOL

# Images judged between two writes: what a kill can cost.
BATCH = 8


class Colors(Protocol):
    """Names the colour of a detected object."""

    def color(self, image: np.ndarray, detection: Detection) -> str: ...


def official_geneval(
    samples: Samples,
    detector: Detector,
    colors: Colors,
    colors_sha256: str,
    share: Share | None = None,
    progress: Progress = silent,
) -> Iterator[Score]:
    """`geneval_<tag>` and `geneval`, and results.jsonl beside the images in the official layout.

    Raises InvalidInput unless all 553 prompts are there with the same number of images each.
    """
    check_official(samples.rows)
    check_prompts(samples.rows, detector.classes, detector.colors)
    samples.check_complete()
    facts = {"detector": detector.name, "detector_sha256": detector.sha256, "clip_sha256": colors_sha256}
    lines = _judged(samples, detector, colors, facts, share or Share(), progress)
    write_atomic(samples.folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    correct, tags = per_prompt([line["correct"] for line in lines], samples.rows)
    summary = summarise(correct, tags)
    prompts = [json.dumps(_prompt(row), sort_keys=True) for row in samples.rows]
    protocol = protocol_id(f"geneval-official-x{len(correct[0])}", prompts=prompts, **facts)
    for tag, rate in summary.tags.items():
        yield rate_score(f"geneval_{tag}", rate, protocol, {**facts, "se_seed": rate.se_seed, "prompts": rate.prompts})
    extra = {**facts, **summary.as_json(), "se_bootstrap": bootstrap_se(correct, tags), "images_sha256": samples.sha256}
    yield rate_score("geneval", summary.overall, protocol, extra)


def check_official(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InvalidInput unless `rows` are GenEval's 553 prompts, each with the same number of images."""
    if missing := sorted({"tag", "prompt", "include"} - set.intersection(*map(set, rows))) if rows else ["prompts"]:
        raise InvalidInput(f"not GenEval's prompts: {missing[0]} is missing; draw evaluation_metadata.jsonl as it is")
    correct, tags = per_prompt([False] * len(rows), rows)
    if (found := Counter(tags)) != PROTOCOL:
        short = ", ".join(f"{tag} {found[tag]} of {n}" for tag, n in PROTOCOL.items() if found[tag] != n)
        raise InvalidInput(
            f"{len(tags)} prompts, GenEval has {sum(PROTOCOL.values())} ({short}); fewer is another score"
        )
    images = Counter(map(len, correct))
    if len(images) != 1:
        raise InvalidInput(f"prompts have {sorted(images)} images each; GenEval needs the same number of every prompt")


def _judged(
    samples: Samples, detector: Detector, colors: Colors, facts: dict[str, Any], share: Share, progress: Progress
) -> list[dict[str, Any]]:
    """One line of results.jsonl per image, in order; what an earlier process judged is read back."""
    folder = samples.folder / protocol_id("judging", images=samples.sha256, **facts)
    folder.mkdir(exist_ok=True)
    known, total = _known(folder), len(samples.rows)
    share.wait()
    mine = [row for row in share.mine(samples.rows) if row["file"] not in known]
    done = total - len(mine) * share.ranks
    with open(folder / f"{share.rank}-of-{share.ranks}.jsonl", "a") as file:
        # What a kill tore stays a line of its own.
        file.write("\n" if file.tell() else "")
        for start in range(0, len(mine), BATCH):
            part = Samples(samples.folder, tuple(mine[start : start + BATCH]))
            verdicts = judge_images(part.images(), part.rows, detector, color_of=colors.color)
            for row, verdict in zip(part.rows, verdicts, strict=True):
                file.write(json.dumps(result_line(row, verdict)) + "\n")
            file.flush()
            done += len(part.rows) * share.ranks
            progress("judging", max(0, min(done, total)), total)
    share.wait()
    known = _known(folder)
    return [known[row["file"]] for row in samples.rows]


def _known(folder: Any) -> dict[str, dict[str, Any]]:
    """Lines by file name; a line torn by a kill is judged again."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
                found[line["filename"]] = line
            except json.JSONDecodeError:
                continue
    return found


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("tag", "include", "exclude", "prompt") if key in row}
