"""The LightningModule around the model family, and the batches it is fed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch

from fluidscale.data.sampler import positions, samples_at
from fluidscale.data.sources import Rows
from fluidscale.model.build import FluidModel
from fluidscale.model.transformer import Text
from fluidscale.spec import RunSpec
from fluidscale.train.optim import adamw, lr_at

# Step, stored tokens (B, L, ..), and the text's values (B, T, ..) and mask (B, T).
Batch = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]
_CHUNK = 64  # steps whose data order is computed at once


class Diverged(RuntimeError):
    """The training loss is no longer finite: a result, not a fault."""


class Batches:
    """Batches from step `start` to the run's last, straight from the memory-mapped rows."""

    def __init__(self, spec: RunSpec, rows: Rows, start: int) -> None:
        self._spec, self._rows, self._start = spec, rows, start

    def __iter__(self) -> Iterator[Batch]:
        train = self._spec.train
        for first in range(self._start, train.steps, _CHUNK):
            steps = range(first, min(first + _CHUNK, train.steps))
            where = positions(train.batch, steps)
            rows, visits = samples_at(self._spec.seed, self._rows.rows, where), where // self._rows.rows
            for step, chosen, visit in zip(steps, rows, visits, strict=True):
                tokens, text = self._rows.gather(chosen, visit)
                yield step, tokens, text.values, text.mask


def step_rng(seed: int, step: int) -> torch.Generator:
    """All randomness of one training step: equal across arms, sizes and restarts."""
    return torch.Generator().manual_seed((seed << 32) + step)


class FluidModule(pl.LightningModule):
    """One arm at one size; everything random comes from (seed, step)."""

    def __init__(self, spec: RunSpec, model: FluidModel) -> None:
        super().__init__()
        self.spec, self.model = spec, model
        self.grad_norm = torch.zeros(())  # of the last step, before clipping

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model, self.spec.train)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.train.grad_clip)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        step, tokens, *text = batch
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = lr_at(self.spec.train, step)
        rng = step_rng(self.spec.seed, step)
        drop = torch.rand(len(tokens), generator=rng) < self.spec.train.text_drop
        tokens = visited(tokens, rng)
        view = self.model.order.training_view(len(tokens), self.spec.model.num_tokens, rng)
        losses, counted = self.model.losses(tokens, Text(*text), view, rng, drop=drop.to(self.device))
        return losses.sum() / counted.sum()


def visited(stored: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Tokens from stored ones: codes (B, L) as they are, moments (B, L, 2C) as a fresh posterior sample (B, L, C).

    The posterior's noise is drawn anew at every visit (MAR).
    """
    if not stored.is_floating_point():
        return stored.long()
    mean, std = stored.float().chunk(2, dim=-1)
    return mean + std * torch.randn(mean.shape, generator=rng).to(mean.device)


def trainer_options(precision: str, device: str) -> dict[str, Any]:
    """Everything of Lightning's Trainer that we do ourselves is switched off."""
    return {
        "accelerator": device,
        "devices": 1,
        "precision": precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
    }
