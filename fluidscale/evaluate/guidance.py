"""What several guidance scales gave: of each metric the run's own and the best, side by side.

Guidance moves a Fréchet distance more than anything else, so a number at one fixed scale compares samplers as much as
models. The best is chosen on the very images it is reported on: among equal models it is better than each by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluidscale.evaluate.protocol import Score
from fluidscale.record import write_json


def sweep(own_scale: float, by_scale: Mapping[float, Sequence[Score]]) -> dict[str, dict[str, Any]]:
    """Per metric: its value at every scale, `fixed` (at the run's own, None where that was not asked) and `best`."""
    found: dict[str, dict[str, Any]] = {}
    for scale, scores in sorted(by_scale.items()):
        for score in scores:
            entry = {"guidance_scale": scale, "value": score.value, "se": score.se, "n": score.n}
            facts = {"unit": score.metric.unit, "higher_is_better": score.metric.higher_is_better}
            found.setdefault(score.metric.name, facts | {"scales": []})["scales"].append(
                entry | {"protocol": score.protocol}
            )
    for metric in found.values():
        sign = 1 if metric["higher_is_better"] else -1
        metric["best"] = max(metric["scales"], key=lambda entry: sign * entry["value"])
        metric["fixed"] = next((one for one in metric["scales"] if one["guidance_scale"] == own_scale), None)
    return found


def keep_sweep(path: Path, scale: float, by_scale: Mapping[float, Sequence[Score]]) -> Iterator[str]:
    """Writes what `sweep` finds, `scale` being the run's own, and yields a line for people of each metric."""
    found = sweep(scale, by_scale)
    write_json(path, {"own_guidance_scale": scale, "metrics": found})
    for name, metric in found.items():
        best, fixed = metric["best"], metric["fixed"]
        at_own = (
            f"{fixed['value']:.5g} at the run's own {scale:g}" if fixed else f"not measured at the run's own {scale:g}"
        )
        yield f"{name}: best {best['value']:.5g} at guidance {best['guidance_scale']:g}, {at_own}"
