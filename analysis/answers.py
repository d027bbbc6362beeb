"""Results prompt by prompt, where they lie beside the table: differences between arms on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.laws import Array
from analysis.table import read_beside

FILE = "per_prompt.parquet"
COLUMNS = ("run_id", "metric", "tag", "prompt", "mean", "n")


@dataclass(frozen=True)
class Answers:
    """One run's prompts in canonical order (arrays (P,)): tag, text, mean over its images, number of images."""

    tags: np.ndarray
    prompts: np.ndarray
    mean: Array
    n: Array

    def of_tag(self, tag: str) -> Answers:
        here = self.tags == tag
        return Answers(self.tags[here], self.prompts[here], self.mean[here], self.n[here])

    def same_prompts(self, other: Answers) -> bool:
        return np.array_equal(self.tags, other.tags) and np.array_equal(self.prompts, other.prompts)


def beside(table: Path) -> dict[tuple[str, str], Answers]:
    """(run id, metric) -> answers, from the file beside a table; empty where there is none. Raises InvalidTable."""
    return read_beside(table, FILE, COLUMNS, "UNREADABLE_PROMPTS", _by_run)


def _by_run(frame: Any) -> dict[tuple[str, str], Answers]:
    frame = frame.sort_values(["run_id", "metric", "tag", "prompt"], kind="stable")
    out = {}
    for (run, metric), rows in frame.groupby(["run_id", "metric"], sort=False):
        tags, prompts = (rows[c].astype(str).to_numpy() for c in ("tag", "prompt"))
        out[str(run), str(metric)] = Answers(tags, prompts, rows["mean"].to_numpy(float), rows["n"].to_numpy(float))
    return out


def of_metric(answers: Mapping[tuple[str, str], Answers], run: str, metric: str) -> Answers | None:
    """A run's answers behind a metric; those of a tag are part of the score's own."""
    if (run, metric) in answers:
        return answers[run, metric]
    whole = answers.get((run, "geneval"))
    part = whole.of_tag(metric.removeprefix("geneval_")) if whole is not None else None
    return part if part is not None and len(part.mean) else None


@dataclass(frozen=True)
class Paired:
    """A score's difference on the same prompts: its error prompt by prompt, as if unpaired, and from drawing alone.

    `drawing` is None where some prompt has a single image: what the seeds of the images add cannot be told.
    """

    effect: float
    error: float
    unpaired: float
    drawing: float | None


def _over_tags(tags: np.ndarray, values: Array) -> tuple[float, float]:
    """The unweighted mean of the tags' means and its standard error over prompts."""
    means, squares = [], 0.0
    for tag in np.unique(tags):
        here = values[tags == tag]
        means.append(here.mean())
        squares += float(here.var(ddof=1)) / len(here) if len(here) > 1 else float("nan")
    return float(np.mean(means)), float(np.sqrt(squares)) / len(means)


def _drawing(runs: Sequence[Answers]) -> float | None:
    """Variance of a score averaged over runs that the images' own seeds add; None with one image a prompt."""
    if any((r.n < 2).any() for r in runs):
        return None
    parts = []
    for r in runs:
        noise = r.mean * (1 - r.mean) / (r.n - 1)
        tags = np.unique(r.tags)
        parts.append(sum(noise[r.tags == t].mean() / (r.tags == t).sum() for t in tags) / len(tags) ** 2)
    return float(np.mean(parts)) / len(runs)


def paired(left: Sequence[Answers], right: Sequence[Answers]) -> Paired | None:
    """Left minus right, each the mean of its runs; None unless all were asked the same prompts."""
    runs = [*left, *right]
    if not left or not right or not all(runs[0].same_prompts(r) for r in runs[1:]):
        return None
    tags = runs[0].tags
    means = [np.mean([r.mean for r in side], axis=0) for side in (left, right)]
    effect, error = _over_tags(tags, means[0] - means[1])
    apart = [_over_tags(tags, m)[1] for m in means]
    drawing = [_drawing(side) for side in (left, right)]
    known = None if drawing[0] is None or drawing[1] is None else drawing[0] + drawing[1]
    return Paired(effect, error, float(np.hypot(apart[0], apart[1])), known)
