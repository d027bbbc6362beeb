"""A sweep's published judges, read from the files that it names: no torch, and no weights are hashed to plan.

A spec says which judges look at what a run draws, and names the prompts by sha256; the judges' own weights are named by
each score's protocol. Where the files lie is kept beside the spec, for the placement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fluidscale.inputs import there
from fluidscale.limits import InvalidInput, unknown_key
from fluidscale.spec import RunSpec
from fluidscale.valid import check

# Published judges by the metric they give: the count of `evaluate` that they look at, and the files they need.
JUDGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "geneval": ("geneval_images_per_prompt", ("geneval_prompts", "detector", "clip")),
    "fid": ("fd_images", ("fid_prompts", "inception", "inception_reference")),
    "fd": ("fd_images", ("fid_prompts", "dinov2", "dinov2_reference")),
    "clip_score": ("fd_images", ("fid_prompts", "clip")),
}
# Of GenEval's own file (djghosh13/geneval, evaluation_metadata.jsonl).
GENEVAL_PROMPTS = 553


@dataclass(frozen=True)
class Judges:
    """A sweep's published judges: where each file lies, which prompts its prompt files hold, what its references are.

    Judges look at all runs of a sweep alike, so that what differs between two scores is the model.
    """

    where: str
    files: dict[str, Path]
    prompts: dict[str, tuple[str, int]]  # sha256 of the file, and how many it holds
    sides: dict[str, int]  # of a reference's images, px

    @property
    def assets(self) -> dict[str, str]:
        return {judge_asset(name): str(path) for name, path in self.files.items()}

    def asked_of(self, spec: RunSpec, side: int | None) -> RunSpec:
        """`spec` with the judges of what it draws, which is `side` px where that is known.

        Raises InvalidInput when they cannot judge it, or when images are asked for that nobody would judge.
        """
        evaluate = spec.evaluate
        asked = [name for name, (count, files) in JUDGES.items() if getattr(evaluate, count) and self._has(files)]
        needed = {file for name in asked for file in JUDGES[name][1]}
        for broken, message in self._rules(spec, side, needed):
            if broken:
                raise InvalidInput(f"{self.where}: {spec.arm} {spec.size}: {message}")
        if not asked:
            return spec
        prompts = {f"{name}_sha256": sha256 for name, (sha256, _) in self.prompts.items() if name in needed}
        judged = replace(spec, evaluate=replace(evaluate, judges=tuple(sorted(asked)), **prompts))
        check(judged, f"{self.where}: {spec.arm} {spec.size}")
        return judged

    def _rules(self, spec: RunSpec, side: int | None, needed: set[str]) -> Iterator[tuple[Any, str]]:
        """Whether something is wrong, and what."""
        yield spec.data.world and self.files, "an embedded world is judged by its own networks; leave `judges` out"
        for count in dict.fromkeys(count for count, _ in JUDGES.values()):
            ways = [files for looked_at, files in JUDGES.values() if looked_at == count]
            # A run that is planned only needs no files yet.
            asked = spec.data.manifest_sha256 and getattr(spec.evaluate, count)
            yield (
                asked and not any(map(self._has, ways)),
                f"evaluate.{count} needs judges: {_listed(ways)}; or set it to 0",
            )
        for name in sorted(needed & set(self.sides)):
            real = self.sides[name]
            yield side not in (None, real), f"draws {side} px, {name} is of images of {real} px; leave it out"
        if "fid_prompts" in needed:
            images, (_, prompts) = spec.evaluate.fd_images, self.prompts["fid_prompts"]
            yield prompts < images, f"evaluate.fd_images is {images}, {self.files['fid_prompts']} has {prompts} prompts"

    def _has(self, needed: tuple[str, ...]) -> bool:
        return set(needed) <= set(self.files)


def judge_asset(name: str) -> str:
    """Under what a judge's file lies in a placement's assets: no hash, since weights of gigabytes are not hashed to
    plan. A score's protocol has it."""
    return f"judge:{name}"


def judge_assets(spec: RunSpec) -> list[str]:
    """All of them that a run's judges need."""
    return sorted({judge_asset(name) for judge in spec.evaluate.judges for name in JUDGES[judge][1]})


def read_judges(files: Mapping[str, Any], where: str) -> Judges:
    """A sweep's section `judges`, {file: path}. Raises InvalidInput on one that is missing, unfit or of no use."""
    at = f"{where}: judges"
    known = {name for _, needed in JUDGES.values() for name in needed}
    for name in files:
        if name not in known:
            raise InvalidInput(unknown_key(name, known, at))
    paths = {name: there(Path(str(path)), f"{at}: {name}") for name, path in files.items()}
    used = {name for _, needed in JUDGES.values() if set(needed) <= set(paths) for name in needed}
    for name in sorted(set(paths) - used):
        ways = [needed for _, needed in JUDGES.values() if name in needed]
        raise InvalidInput(f"{at}: {name} alone judges nothing; name {_listed(ways)}")
    for name in sorted({"detector", "clip", "dinov2"} & set(paths)):
        there(paths[name] / "config.json", f"{at}: {name}: a folder in transformers' format is needed")
    prompts = {name: _read_prompts(path) for name, path in paths.items() if name.endswith("_prompts")}
    if (count := prompts.get("geneval_prompts", ("", GENEVAL_PROMPTS))[1]) != GENEVAL_PROMPTS:
        raise InvalidInput(f"{paths['geneval_prompts']}: {count} prompts, GenEval has {GENEVAL_PROMPTS}")
    sides = {name: _side(path, name) for name, path in paths.items() if name.endswith("_reference")}
    return Judges(where, paths, prompts, sides)


def _side(path: Path, name: str) -> int:
    """Of a reference's images, px. Raises InvalidInput when it was made by another extractor than its name says."""
    facts = reference_facts(path)
    if name != f"{facts['extractor']}_reference":
        raise InvalidInput(f"{path}: statistics of {facts['extractor']}, which is not what {name} is compared by")
    return facts["side"]


def _listed(ways: list[tuple[str, ...]]) -> str:
    return " or ".join(" + ".join(needed) for needed in ways)


def _read_prompts(path: Path) -> tuple[str, int]:
    content = path.read_bytes()
    try:
        texts = [json.loads(line)["prompt"] for line in content.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: expected a JSON object with a text under 'prompt' a line ({error!r})") from error
    return hashlib.sha256(content).hexdigest(), len(texts)


def reference_facts(path: Path) -> dict[str, Any]:
    """What a reference (`evaluate.judges.coco`) is of; its features are not read. Raises InvalidInput if it is none."""
    try:
        with np.load(path, allow_pickle=False) as content:
            facts = json.loads(str(content["facts"]))
            _ = facts["side"], facts["extractor"], facts["extractor_sha256"]
            return facts
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, BadZipFile) as error:
        raise InvalidInput(f"{path}: not reference statistics of this program ({error}); make them again") from error
