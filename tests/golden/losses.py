"""Losses of the four arms on fixed weights and draws. Regenerate: `python tests/golden/losses.py` from the root."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import ARMS, POSITIONS, arm_spec, awake, text_of, tokens_of


def measure() -> dict[str, dict[str, float]]:
    """{case: {loss, nll}}, nats or the diffusion loss, the mean over counted tokens."""
    cases = [(arm, position, "flow") for arm in ARMS for position in POSITIONS]
    cases += [("continuous-random", "input", objective) for objective in ("eps", "v")]
    return {" ".join(case): _measure(*case) for case in cases}


@torch.no_grad()
def _measure(arm: str, position: str, objective: str) -> dict[str, float]:
    model = awake(arm_spec(arm, position, objective))
    tokens, text = tokens_of(model.spec, 16), text_of(model.spec, 16)
    view = model.order.training_view(16, model.spec.num_tokens, torch.Generator().manual_seed(4))
    drop = torch.arange(16) < 2
    losses, counted = model.losses(tokens, text, view, torch.Generator().manual_seed(5), drop)
    nll = model.nll(tokens, text, view, torch.Generator().manual_seed(6))
    count = float(counted.sum())
    return {"loss": float(losses.double().sum()) / count, "nll": float(nll.double().sum()) / count}


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(measure(), indent=1) + "\n")
    print(f"wrote {path}")
