"""An exponential moving average of the weights: what is evaluated and kept."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class EMA(Callback):
    """Averages the model's parameters after every update; travels in the checkpoint."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._shadow: list[torch.Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._shadow:
            self._shadow = [p.detach().clone() for p in pl_module.parameters()]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shadow = [s.to(p.device) for s, p in zip(self._shadow, pl_module.parameters(), strict=True)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            # One call for all tensors; torch has no public name for it.
            current = [p.detach() for p in pl_module.parameters()]
            torch._foreach_lerp_(self._shadow, current, 1 - self._decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self._shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._shadow = [tensor.clone() for tensor in state_dict["shadow"]]

    def copy_to(self, model: torch.nn.Module) -> None:
        """Overwrites the model's parameters with their average."""
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), self._shadow, strict=True):
                parameter.copy_(average)
