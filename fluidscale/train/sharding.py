"""Models that do not fit one device: parameters sharded over the processes (FSDP2), activations computed twice.

A sharded checkpoint is a folder: each process writes its own part, the first one the rest; it loads into any number of
processes. Like a checkpoint in one file it is whole or absent.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fluidscale.model.build import FluidModel
from fluidscale.model.denoiser import Denoiser, DenoiserBlock
from fluidscale.model.transformer import Block
from fluidscale.record import write_json
from fluidscale.train.checkpoint import META, SIZES, flush_folder, make_room, sizes

_AVERAGE = "average"


def shard(model: FluidModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards every block, the denoiser, and what is left; parameters are gathered in `dtype`, gradients summed in
    float32."""
    # Inputs keep their precision: autocast decides about each operation, as it does on one device.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [m for m in model.modules() if isinstance(m, (Block, Denoiser))]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "losses_under")


def recompute(model: nn.Module) -> None:
    """Keeps only the blocks' inputs for the backward pass, which computes what is inside them again."""
    for block in [m for m in model.modules() if isinstance(m, (Block, DenoiserBlock))]:
        # Nothing random happens inside a block.
        again = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, gathered from all processes if it is sharded: all of them must ask."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints that survive a kill while they are written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(filepath)
        temporary = path.with_name(f".{path.name}.tmp")
        if self.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.barrier()
        # Lightning saves what callbacks hold from the first process alone; the average is sharded like the weights.
        average = checkpoint["callbacks"]["EMA"].pop("shadow")
        save(dict(zip(self._names(), average, strict=True)), checkpoint_id=temporary / _AVERAGE)
        super().save_checkpoint(checkpoint, temporary)
        self.barrier()
        if self.is_global_zero:
            write_json(temporary / SIZES, sizes(temporary))
            with open(temporary / META, "rb") as file:
                os.fsync(file.fileno())
            flush_folder(temporary)
            make_room(path)
            os.replace(temporary, path)
            flush_folder(path.parent)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        # Lightning forgets to ask for safe loading when it restores after the set-up of the model.
        rest = super().load_checkpoint(path, weights_only=True)
        assert self.lightning_module is not None
        parameters = self.lightning_module.parameters()
        average = {name: torch.empty_like(p) for name, p in zip(self._names(), parameters, strict=True)}
        load(average, checkpoint_id=path / _AVERAGE)
        rest["callbacks"]["EMA"]["shadow"] = list(average.values())
        return rest

    def _names(self) -> list[str]:
        assert self.lightning_module is not None
        return [name for name, _ in self.lightning_module.named_parameters()]
