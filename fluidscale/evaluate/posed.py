"""GenEval's score of a folder of images, judged image by image: a long judgement goes on where it was stopped.

It serves every detector; a run's own prompts (`geneval`) are judged in one go, and what only the official score asks
for is in `judges.official`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fluidscale.evaluate.geneval import bootstrap_se, judge_images, per_prompt, result_line, summarise, summary_scores
from fluidscale.evaluate.protocol import Detection, Detector, Progress, Score, protocol_id, silent
from fluidscale.evaluate.rules import check_prompts
from fluidscale.evaluate.samples import Samples
from fluidscale.evaluate.share import Share
from fluidscale.record import write_atomic

# Images judged between two writes: what a kill can cost.
BATCH = 8
# (image uint8 (H, W, 3), detection) -> the colour's name
ColorOf = Callable[[np.ndarray, Detection], str]


def posed_geneval(
    kind: str,
    samples: Samples,
    detector: Detector,
    facts: Mapping[str, Any],
    color_of: ColorOf | None = None,
    share: Share | None = None,
    progress: Progress = silent,
) -> Iterator[Score]:
    """`geneval_<tag>` and `geneval`, and results.jsonl beside the images in the official layout.

    `kind` and `facts` are the protocol's. Raises InvalidInput on a prompt that cannot be judged and unless every image
    is there.
    """
    check_prompts(samples.rows, detector.classes, detector.colors)
    samples.check_complete()
    lines = _judged(samples, detector, color_of, facts, share or Share(), progress)
    write_atomic(samples.folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    correct, tags = per_prompt([line["correct"] for line in lines], samples.rows)
    protocol = posed_protocol(kind, samples.rows, facts)
    for score in summary_scores(summarise(correct, tags), protocol, dict(facts)):
        if score.metric.name == "geneval":
            score.extra.update(se_bootstrap=bootstrap_se(correct, tags), images_sha256=samples.sha256)
        yield score


def posed_protocol(kind: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """How `rows`, an entry an image, are judged; the first prompt has as many images as any."""
    images, _ = per_prompt([False] * len(rows), rows)
    prompts = [json.dumps(_prompt(row), sort_keys=True) for row in rows]
    return protocol_id(f"{kind}-x{len(images[0])}", prompts=prompts, **facts)


def _judged(
    samples: Samples,
    detector: Detector,
    color_of: ColorOf | None,
    facts: Mapping[str, Any],
    share: Share,
    progress: Progress,
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
            verdicts = judge_images(part.images(), part.rows, detector, color_of=color_of)
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
