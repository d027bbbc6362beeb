"""Training one run on its placement: from the newest checkpoint there is to the averaged weights."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors import SafetensorError
from safetensors.torch import save_file

from fluidscale.data.sources import Rows
from fluidscale.folder import RunFolder, trunk_checkpoint, trunk_folder
from fluidscale.limits import InvalidInput, checked
from fluidscale.model.build import FluidModel, build
from fluidscale.model.deferred import Fill, build_without_values
from fluidscale.record import Placement, atomic, write_json
from fluidscale.spec import RunSpec
from fluidscale.train.batches import Batches, share_of
from fluidscale.train.callbacks import Checkpoints, Monitor, OwnSignal
from fluidscale.train.checkpoint import NEWEST, PREVIOUS, AtomicCheckpointIO, newest_loadable, remove
from fluidscale.train.ema import EMA
from fluidscale.train.module import FluidModule
from fluidscale.train.ranks import Ranks
from fluidscale.train.sharding import Sharded, whole

log = logging.getLogger(__name__)


def fit(
    spec: RunSpec,
    folder: RunFolder,
    placement: Placement,
    rows: Rows,
    should_stop: Callable[[], bool],
    ranks: Ranks,
) -> None:
    """Trains what is missing and leaves the averaged weights in the folder; every process of the run calls it.

    Raises `Diverged`, `Stopped`, and InvalidInput for a placement that does not fit the spec.
    """
    # Lightning sets its own level when imported; its hints and advertisements are not this run's log.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    check(placement)
    trunk = trunk_folder(folder.path.parent, spec.trunk_id)
    branches = sorted({*placement.branch_steps, spec.train.branch_step})
    path, start = ranks.agree(_resume(spec, folder, placement, trunk, branches) if ranks.leads else (None, 0))
    log.info("training from step %d of %d%s", start, spec.train.steps, f" ({path})" if path else "")
    share = share_of(spec.train.batch, placement, ranks.rank)
    module = FluidModule(spec, *_model(spec, placement, fresh=path is None), share, placement)
    ema, monitor = EMA(spec.train.ema_decay), Monitor(spec, folder, ranks)
    trainer = pl.Trainer(
        **trainer_options(placement),
        accumulate_grad_batches=share.parts,
        max_steps=spec.train.steps,
        callbacks=[OwnSignal(), ema, monitor, Checkpoints(spec, folder, trunk, placement, should_stop, ranks)],
        plugins=[AtomicCheckpointIO(), ranks.environment],
    )
    trainer.fit(module, train_dataloaders=Batches(spec, rows, start, share), ckpt_path=path, weights_only=True)
    ema.copy_to(module.model)
    # Every process helps to gather each tensor, and the first one alone keeps it.
    gathered = ((name, whole(tensor)) for name, tensor in module.model.state_dict().items())
    state = {name: tensor for name, tensor in gathered if ranks.leads}
    if ranks.leads:
        cost = {"seconds": monitor.seconds, "tokens_per_s": monitor.tokens_per_s, "processes": placement.processes}
        write_json(folder.checkpoints / "cost.json", cost)
        with atomic(folder.weights) as weights:
            _save(state, weights)
        # The averaged weights are kept; the optimiser's state is of use to the trunk only, which keeps its own.
        for name in (NEWEST, PREVIOUS):
            remove(folder.checkpoints / name)
        if spec.train.branch_step == branches[-1]:
            prune_trunk(trunk)
    # The others read the weights next.
    ranks.barrier()


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    """Raises OSError with its number where the system refuses: safetensors hides it in a message of its own."""
    try:
        save_file(state, path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), str(error)) from error
        raise


def _model(spec: RunSpec, placement: Placement, fresh: bool) -> tuple[FluidModel, list[Fill]]:
    """The model to train, and what is to be drawn once it is sharded; a checkpoint's values need not be drawn."""
    if placement.strategy == "fsdp":
        model, fills = build_without_values(spec.model)
        return model, fills if fresh else []
    torch.manual_seed(spec.seed)
    return build(spec.model), []


def check(placement: Placement) -> None:
    """Raises InvalidInput for a placement that names no way to train."""
    checked(placement, "placement")
    if placement.strategy == "single" and placement.processes > 1:
        raise InvalidInput(
            f"placement: {placement.nodes} node(s) x {placement.devices} devices need strategy ddp or fsdp"
        )


def _resume(
    spec: RunSpec, folder: RunFolder, placement: Placement, trunk: Path, branches: list[int]
) -> tuple[str | None, int]:
    """The checkpoint to go on from and its step; sets metrics.jsonl to what led there."""
    own = [folder.checkpoints / NEWEST, folder.checkpoints / PREVIOUS]
    shared = [trunk_checkpoint(trunk, step) for step in branches if step <= spec.train.branch_step]
    found = newest_loadable(own + shared, spec.train.steps, placement.strategy == "fsdp", spec)
    path, start = found or (None, 0)
    source = path.with_suffix(".jsonl") if path in shared else folder.metrics
    folder.keep_metrics(source, start)
    return (str(path) if path else None), start


def trainer_options(placement: Placement) -> dict[str, Any]:
    """Where Lightning computes; everything of it that we do ourselves is switched off."""
    strategies: dict[str, Callable[[], Any]] = {
        "single": lambda: "auto",
        # Every parameter gets a gradient in every step, and no buffer changes.
        "ddp": lambda: DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True),
        "fsdp": lambda: Sharded(data_parallel_size=placement.processes, tensor_parallel_size=1),
    }
    return {
        "strategy": strategies[placement.strategy](),
        "accelerator": placement.device,
        "devices": placement.devices,
        "num_nodes": placement.nodes,
        "precision": placement.precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
    }


def prune_trunk(trunk: Path) -> None:
    """Keeps a trunk's newest checkpoint, from which a longer run can go on; called by the longest of its runs."""
    for checkpoint in sorted(trunk.glob("step-*.ckpt"))[:-1]:
        remove(checkpoint)
        checkpoint.with_suffix(".jsonl").unlink(missing_ok=True)
