"""The LightningModule around the model family."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from fluidscale.model.build import FluidModel
from fluidscale.model.deferred import Fill, draw_values
from fluidscale.model.transformer import Text
from fluidscale.record import Placement
from fluidscale.spec import RunSpec
from fluidscale.train.batches import Batch, Share, StepDraws, draw_step, visited
from fluidscale.train.compiled import compile_blocks
from fluidscale.train.optim import adamw, set_lr
from fluidscale.train.sharding import recompute, shard


class Diverged(RuntimeError):
    """The training loss is no longer finite: a result, not a fault."""


class FluidModule(pl.LightningModule):
    """One arm at one size; everything random comes from (seed, step).

    The loss is the sum over all counted tokens of the global batch over their number. Each part of the batch adds its
    own tokens' share, scaled by how often Lightning will divide: by the processes, and by the parts of each.
    """

    def __init__(self, spec: RunSpec, model: FluidModel, fills: list[Fill], share: Share, placement: Placement) -> None:
        """`fills`: the values of a model that comes without any, to be drawn where its parts have come to lie."""
        super().__init__()
        self.spec, self.model, self._fills = spec, model, fills
        self._share, self._placement = share, placement
        self.grad_norm = torch.zeros(())  # of the last step, before clipping
        self._draws: tuple[int, StepDraws] | None = None
        self._loss: torch.Tensor | float = 0.0

    def configure_model(self) -> None:
        if self._placement.compile:
            compile_blocks(self.model)
        if self._placement.recompute:
            recompute(self.model)
        if self.device_mesh is not None:
            half = str(self.trainer.precision).startswith("bf16")
            shard(self.model, self.device_mesh["data_parallel"], torch.bfloat16 if half else torch.float32)
            self.model.to_empty(device=self.trainer.strategy.root_device)
            torch.manual_seed(self.spec.seed)
            draw_values(self.model, self._fills)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model, self.spec.train)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.train.grad_clip)
        # Of a sharded model the norm is a sum that lies in parts.
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        step, part, tokens, *text = batch
        set_lr(self.optimizers(use_pl_optimizer=False), self.spec.train, step)  # type: ignore[arg-type]
        if self._draws is None or self._draws[0] != step:
            self._draws = step, draw_step(self.model, self.spec, step)
        everyone = self._draws[1]
        own = everyone.rows(part)
        tokens, drop = visited(tokens, own.posterior), own.drop.to(self.device)
        losses, _ = self.model.losses_under(own.noise, tokens, Text(*text), own.view, drop)
        loss = losses.sum() / everyone.view.counted.sum().to(self.device)
        self._loss = self._loss + loss.detach()
        return loss * (self._share.processes * self._share.parts)

    def take_loss(self) -> torch.Tensor:
        """This process's share of the loss since the last call: of the step that has just ended."""
        loss, self._loss = self._loss, 0.0
        assert isinstance(loss, torch.Tensor)
        return loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning counts parts, which may be others than those of the process that saved.
        loop = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        seen = checkpoint["global_step"] * self._share.parts
        for counts in (loop["total"], loop["current"]):
            counts.update(ready=seen, started=seen, processed=seen, completed=seen - 1)
