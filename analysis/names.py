"""What metrics and groups are called where people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

METRIC_NAMES = {
    "val_loss": "validation loss", "val_nll": "validation NLL", "fd": "Fréchet distance", "fid": "FID",
    "geneval": "GenEval-protocol score", "geneval_unseen": "score, unseen combinations",
}  # fmt: skip


def title_of(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.removeprefix("geneval_").replace("_", " "))


def name_of(group: Mapping[str, str]) -> str:
    return "-".join(group.values()) or "all"


def label_of(group: Mapping[str, str]) -> str:
    """The arm in words; settings that split it are named, for a bare number says little."""
    return " · ".join(_parts(group)) or "all runs"


def heading_of(group: Mapping[str, str]) -> str:
    """`label_of` above a narrow panel: settings on a line of their own."""
    parts = _parts(group)
    return "\n".join(filter(None, (" · ".join(parts[:2]), " · ".join(parts[2:])))) or "all runs"


def members_of(members: Sequence[str], arms: Sequence[str]) -> str:
    """Some of the arms, as briefly as it can be said."""
    missing = [arm for arm in arms if arm not in members]
    if len(arms) > 1 and not missing:
        return "every arm"
    return f"every arm but {', '.join(missing)}" if len(missing) < len(members) > 2 else ", ".join(members)


def _parts(group: Mapping[str, str]) -> list[str]:
    arm = {"token_kind", "order"}
    split = arm < {*group}
    return [f"{key.rpartition('.')[2]} {value}" if split and key not in arm else value for key, value in group.items()]
