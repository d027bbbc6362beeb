"""What was refused, a row a reason: a ladder of one size refuses every law of every metric in every arm alike."""

from __future__ import annotations

from typing import Any

from analysis.names import label_of, title_of

Document = dict[str, Any]


def gathered(doc: Document) -> list[tuple[str, str, str]]:
    """Code, reason, and the laws, metrics and arms that it kept from being fitted."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for refused in doc["refused"]:
        law, message = refused["law"], refused["message"]
        # "val_loss in continuous-random: 1 distinct N, law chinchilla needs 3 or more": the rest is told beside.
        reason = message.partition(": ")[2] or message
        reason = reason.replace(f"law {law} needs", "the law needs") if law else reason
        cell = label_of(refused["group"]), title_of(refused["metric"])
        found.setdefault((refused["code"], reason), {}).setdefault(cell, []).append(law or "all laws")
    arms = list(dict.fromkeys(label_of(m["group"]) for m in doc["measurements"]))
    return [(code, reason, _where(cells, arms)) for (code, reason), cells in found.items()]


def _where(cells: dict[tuple[str, str], list[str]], arms: list[str]) -> str:
    """Cells (arm, metric) that lack the same laws in one phrase, as far as they make a rectangle."""
    by_metric: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (arm, metric), laws in cells.items():
        by_metric.setdefault((metric, tuple(dict.fromkeys(laws))), []).append(arm)
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (metric, laws), members in by_metric.items():
        alike.setdefault((laws, tuple(members)), []).append(metric)
    phrases = (
        f"{', '.join(metrics)} in {_members(members, arms)}: {', '.join(laws)} not fitted"
        for (laws, members), metrics in alike.items()
    )
    return "; ".join(phrases)


def _members(members: tuple[str, ...], arms: list[str]) -> str:
    missing = [arm for arm in arms if arm not in members]
    if len(arms) > 1 and not missing:
        return "every arm"
    return f"every arm but {', '.join(missing)}" if len(missing) < len(members) > 2 else ", ".join(members)
