"""An exponential moving average of the weights: what is evaluated and kept."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.tensor import DTensor

from fluidscale.train.steps import AfterStep


class EMA(AfterStep):
    """Averages the model's parameters after every update; travels in the checkpoint, sharded where they are."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._shadow: list[torch.Tensor] = []
        self._parameters: list[torch.Tensor] = []  # walking through the modules takes longer than averaging

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parameters = list(pl_module.parameters())
        shadow = self._shadow or [p.detach().clone() for p in self._parameters]
        self._shadow = [s.to(p.device) for s, p in zip(shadow, self._parameters, strict=True)]

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            shadow = [_local(tensor) for tensor in self._shadow]
            current = [_local(p.detach()) for p in self._parameters]
            # One call for all tensors; torch has no public name for it.
            torch._foreach_lerp_(shadow, current, 1 - self._decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self._shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._shadow = [tensor.clone() for tensor in state_dict["shadow"]]

    def copy_to(self, model: torch.nn.Module) -> None:
        """Overwrites the model's parameters with their average."""
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), self._shadow, strict=True):
                parameter.copy_(average)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that lies here: an average needs no other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
