"""What finished runs drew, made small for the table's folder: results a prompt and one prompt's images."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluidscale.record import read_json, write_atomic
from fluidscale.spec import RunSpec, canonical
from slurm.parquet import write_rows

# The score of a run and the prompts it was asked, of an embedded world or of GenEval's own file; tags are parts of it.
_SETS = {"geneval": ("seen", "geneval"), "geneval_unseen": ("unseen",)}
# Two folders of pictures may lie in a run (other weights, other prompts): the one that gives the recorded score counts.
_SAME = 1e-9
# Images of the shown prompt, and the tag it is of: two objects show more than one, and no tag is as hard as position.
_SHOWN, _SHOWN_TAG = 4, "two_object"


@dataclass(frozen=True)
class Answer:
    """One prompt of a run: whether each of its images is right, and their files."""

    tag: str
    prompt: str
    right: tuple[bool, ...]
    files: tuple[Path, ...]

    @property
    def mean(self) -> float:
        return sum(self.right) / len(self.right)


def answers(run_dir: Path, record: Mapping[str, Any]) -> dict[str, list[Answer]]:
    """Metric -> its prompts; a metric without results that give the recorded score is left out."""
    found = {}
    for metric, sets in _SETS.items():
        for path in sorted(p for name in sets for p in (run_dir / "samples").glob(f"{name}-*/results.jsonl")):
            read = _read(path)
            if record.get(metric) is not None and abs(_score(read) - record[metric]) < _SAME:
                found[metric] = read
    return found


def _read(path: Path) -> list[Answer]:
    images: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        image = json.loads(line)
        images.setdefault((image["tag"], image["prompt"]), []).append(image)
    return [
        Answer(tag, prompt, tuple(bool(i["correct"]) for i in of), tuple(path.parent / i["filename"] for i in of))
        for (tag, prompt), of in images.items()
    ]


def _score(found: Sequence[Answer]) -> float:
    """The unweighted mean of the tags' means over images, of which every prompt of a tag has the same number."""
    tags: dict[str, list[bool]] = {}
    for answer in found:
        # A file may pose a text twice, whose images are then one answer.
        tags.setdefault(answer.tag, []).extend(answer.right)
    return sum(sum(right) / len(right) for right in tags.values()) / max(len(tags), 1)


def protocols_any_n(spec: RunSpec, run_dir: Path, found: Mapping[str, Sequence[Answer]]) -> dict[str, str]:
    """`<metric>_protocol_any_n` of every score: who judged what, whatever the number of images.

    In an embedded world the guidance is part of it, one for all arms; the paper's arms have each their own.
    A mean over prompts is unbiased in that number: scores that differ in it alone may share a law. Empty where the
    results do not lie in the run's folder.
    """
    judges = (read_json(run_dir / "eval" / "geneval.json") or {}).get("extra") or {}
    if "detector_sha256" not in judges or not found:
        return {}
    judge = {
        "detector": judges["detector_sha256"],
        # GenEval's own detector leaves colours to CLIP.
        **({"clip": judges["clip_sha256"]} if "clip_sha256" in judges else {}),
        "world": canonical(spec.data.world),
    }

    def name(asked: Sequence[Answer]) -> str:
        # Of this score's prompts alone: a lighter evaluation asks fewer of other scores.
        facts = {**judge, "prompts": sorted({(a.tag, a.prompt) for a in asked})}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        guidance = f"-g{spec.evaluate.sampling.guidance_scale:g}" if spec.data.world else ""
        return f"geneval-{spec.data.name}{guidance}-{digest}"

    tags = {f"geneval_{answer.tag}": found["geneval"] for answer in found.get("geneval", ())}
    return {f"{metric}_protocol_any_n": name(asked) for metric, asked in {**found, **tags}.items()}


def write_per_prompt(path: Path, runs: Mapping[str, Mapping[str, Sequence[Answer]]]) -> None:
    """Writes run_id, metric, tag, prompt, mean, n: a row a run and prompt."""
    rows = [
        (run_id, metric, answer.tag, answer.prompt, answer.mean, len(answer.right))
        for run_id, found in runs.items()
        for metric, asked in found.items()
        for answer in asked
    ]
    write_rows(path, ("run_id", "metric", "tag", "prompt", "mean", "n"), rows)


def write_one_prompt(folder: Path, shown: Mapping[str, Sequence[Answer]]) -> None:
    """<name>.png of every run in `shown`, each the first images of one prompt that all were asked, and prompt.txt.

    The prompt is the first one of its tag by the alphabet: chosen by no result.
    """
    shutil.rmtree(folder, ignore_errors=True)
    asked = [{(a.tag, a.prompt) for a in found if all(f.is_file() for f in a.files)} for found in shown.values()]
    common = sorted(set.intersection(*asked), key=lambda key: (key[0] != _SHOWN_TAG, key[1])) if asked else []
    if not common:
        return
    for name, found in shown.items():
        files = next(a.files for a in found if (a.tag, a.prompt) == common[0])
        write_atomic(folder / f"{name}.png", _side_by_side(files[:_SHOWN]))
    write_atomic(folder / "prompt.txt", common[0][1] + "\n")


def _side_by_side(files: Iterable[Path]) -> bytes:
    from PIL import Image

    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    out = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
    left = 0
    for image in images:
        out.paste(image, (left, 0))
        left += image.width
    content = io.BytesIO()
    out.save(content, format="PNG")
    return content.getvalue()
