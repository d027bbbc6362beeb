"""The learning-rate schedule and AdamW, as one run's spec asks for them."""

from __future__ import annotations

import math

import torch

from fluidscale.spec import TrainSpec


def lr_at(train: TrainSpec, step: int) -> float:
    """The rate used by update number `step` (from 0): linear warm-up, constant, cool-down to zero.

    Up to the branch step it does not depend on how long the run is, so runs of several lengths share a trunk.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if step < train.branch_step:
        return train.lr
    left = (train.steps - step) / (train.decay_steps + 1)
    if train.decay_shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return train.lr * left


def set_lr(optimizer: torch.optim.Optimizer, train: TrainSpec, step: int) -> None:
    """Gives every group of parameters its rate for update number `step`."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("lr_scale", 1.0) * lr_at(train, step)  # an older checkpoint names no scale


def adamw(model: torch.nn.Module, train: TrainSpec) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases, gains and other 1-D parameters are left alone (MAR).

    Without `decay_head` the denoising head is left alone too. With `lr_vectors` all but the weights of linear maps has
    that rate, and the same course of it.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    own = 1.0 if train.lr_vectors is None else train.lr_vectors / train.lr
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        decays = p.ndim >= 2 and (train.decay_head or not name.startswith("head.denoiser"))
        if p.requires_grad:
            groups.setdefault((decays, 1.0 if id(p) in matrices else own), []).append(p)
    # Sorted: a checkpoint tells groups by their place.
    described = [
        {"params": params, "weight_decay": train.weight_decay * decays, "lr_scale": scale}
        for (decays, scale), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    # The fused kernel is 3 to 6 times faster than the default on a CPU.
    return torch.optim.AdamW(described, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)
