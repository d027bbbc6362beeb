"""What was refused, a row a reason: a ladder of one size refuses every law of every metric in every arm alike."""

from __future__ import annotations

import re
from typing import Any

from analysis.names import label_of, members_of, name_of, title_of

Document = dict[str, Any]


def gathered(doc: Document) -> list[tuple[str, str, str]]:
    """Code, reason, and the laws, metrics and arms that it kept from being fitted."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for refused in doc["refused"]:
        law, reason = refused["law"], _reason(refused)
        cell = label_of(refused["group"]), title_of(refused["metric"])
        found.setdefault((refused["code"], reason), {}).setdefault(cell, []).append(law or "all laws")
    arms = list(dict.fromkeys(label_of(m["group"]) for m in doc["measurements"]))
    return [(code, reason, _where(cells, arms)) for (code, reason), cells in found.items()]


def _reason(refused: Document) -> str:
    """The message without the metric, arm, law and value, which stand beside it or tell like refusals apart."""
    name = name_of(refused["group"])
    text = refused["message"].removeprefix(f"{refused['metric']} in ").removeprefix(name).lstrip(": ")
    text = re.sub(r"^is \S+ in every run", "the metric is the same in every run", text)
    return text.replace(f"law {refused['law']}", "the law") if refused["law"] else text


def _where(cells: dict[tuple[str, str], list[str]], arms: list[str]) -> str:
    """Cells (arm, metric) that lack the same laws in one phrase, as far as they make a rectangle."""
    by_metric: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (arm, metric), laws in cells.items():
        by_metric.setdefault((metric, tuple(dict.fromkeys(laws))), []).append(arm)
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (metric, laws), members in by_metric.items():
        alike.setdefault((laws, tuple(members)), []).append(metric)
    phrases = (
        f"{', '.join(metrics)} in {members_of(members, arms)}: {', '.join(laws)} not fitted"
        for (laws, members), metrics in alike.items()
    )
    return "; ".join(phrases)
