"""The evaluations of a run, in the order in which they are of use, each kept as a file as soon as it is known."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from fluidscale.evaluate.agreement import DetectorAgreement
from fluidscale.evaluate.fid import FrechetDistance
from fluidscale.evaluate.generate import draw_all
from fluidscale.evaluate.geneval import GenEval
from fluidscale.evaluate.judges.evaluators import PUBLISHED
from fluidscale.evaluate.likelihood import (
    StepwiseLikelihood,
    ValidationLikelihood,
    own_schedule,
    raster_schedule,
)
from fluidscale.evaluate.loss import ValidationLoss
from fluidscale.evaluate.protocol import Evaluator, Metric, Progress, Score, Subject, silent
from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput

EVALUATORS: tuple[Evaluator, ...] = (
    ValidationLoss(),
    ValidationLikelihood(),
    StepwiseLikelihood("val_nll_raster_order", raster_schedule),
    StepwiseLikelihood("val_nll_k_steps", own_schedule),
    GenEval(),
    DetectorAgreement(),
    FrechetDistance(),
    *PUBLISHED,
)


def evaluate(subject: Subject, which: Collection[str] | None = None, progress: Progress = silent) -> Iterator[Score]:
    """Runs what the run's spec asks for (or those of `which` alone) and writes eval/<metric>.json as scores come.

    Scores of the same weights under the same protocol are read back, not measured again. Raises InvalidInput on a
    name that no evaluator has, or one that the spec gives no images.
    """
    for _, score in evaluate_all([(subject, chosen(subject, which))], progress):
        yield score


def evaluate_all(
    asked: Sequence[tuple[Subject, Sequence[Evaluator]]], progress: Progress = silent
) -> Iterator[tuple[Subject, Score]]:
    """The same for several ways of sampling one model: before the first that looks at drawn images, all that any of
    them needs is drawn, in common batches."""
    pairs = [(subject, evaluator) for subject, evaluators in asked for evaluator in evaluators]
    stored = [subject.share.agreed(_stored(evaluator, subject)) for subject, evaluator in pairs]
    needed = [
        [] if known else evaluator.drawings(subject) for (subject, evaluator), known in zip(pairs, stored, strict=True)
    ]
    drawn = False
    for (subject, evaluator), known, drawings in zip(pairs, stored, needed, strict=True):
        if drawings and not drawn:
            draw_all([drawing for of_one in needed for drawing in of_one], progress)
            drawn = True
        for score in known or _measured(evaluator, subject, progress):
            yield subject, score


def rehearse(subject: Subject) -> None:
    """Asks every evaluator what it would draw, so that one that cannot judge is refused before a model is trained.

    The model's values are not looked at. Raises InvalidInput.
    """
    for evaluator in chosen(subject, None):
        evaluator.drawings(subject)


def _measured(evaluator: Evaluator, subject: Subject, progress: Progress) -> Iterator[Score]:
    companions: list[str] = []
    for score in evaluator(subject, progress):
        # The evaluator's own score comes last and names the others: it stands only when all of them do.
        own = score.metric.name == evaluator.name
        if subject.share.rank == 0:
            write_json(_path(subject, score.metric.name), _as_json(score, subject, companions if own else []))
        companions.append(score.metric.name)
        yield score


def chosen(subject: Subject, which: Collection[str] | None) -> list[Evaluator]:
    """The evaluators named, or all that the spec gives images to."""
    wanted = {e.name: e for e in EVALUATORS if e.wanted(subject.spec)}
    for name in which or ():
        if name not in wanted:
            known = ", ".join(dict.fromkeys(e.name for e in EVALUATORS))
            reason = "its image count is 0 in the run's spec, it has no such judge, or its order has none"
            reason = reason if name in known.split(", ") else f"known: {known}"
            raise InvalidInput(f"cannot evaluate {name!r}: {reason}")
    return [e for name, e in wanted.items() if which is None or name in which]


def _stored(evaluator: Evaluator, subject: Subject) -> list[Score]:
    """The scores of an earlier evaluation with the same weights and protocol; empty unless all of them are there."""
    own = _read(_path(subject, evaluator.name))
    if own is None:
        return []
    found = [*(_read(_path(subject, name)) for name in own["companions"]), own]
    facts = (subject.weights_sha256, evaluator.protocol(subject))
    if any(score is None or (score["weights"], score["protocol"]) != facts for score in found):
        return []
    return [_from_json(score) for score in found if score is not None]


def _path(subject: Subject, metric: str) -> Path:
    return subject.scores_dir / f"{metric}.json"


def _as_json(score: Score, subject: Subject, companions: list[str]) -> dict[str, Any]:
    return {
        "metric": score.metric.name,
        "unit": score.metric.unit,
        "higher_is_better": score.metric.higher_is_better,
        "value": score.value,
        "se": score.se,
        "n": score.n,
        "protocol": score.protocol,
        "weights": subject.weights_sha256,
        "companions": companions,
        "extra": score.extra,
    }


def _from_json(content: dict[str, Any]) -> Score:
    metric = Metric(content["metric"], content["unit"], content["higher_is_better"])
    se = float("nan") if content["se"] is None else content["se"]
    return Score(metric, content["value"], se, content["n"], content["protocol"], content["extra"])


def _read(path: Path) -> dict[str, Any] | None:
    content = read_json(path)
    if content is not None and not {"metric", "weights", "protocol", "companions"} <= set(content):
        raise InvalidInput(f"{path}: not a score of this program; move it away to evaluate again")
    return content
