"""The processes that compute one run together: who they are, and what they agree on.

A placement of one process needs none of this. Several are started by SLURM (a task each) or by torchrun; each finds its
place in the environment. Tensors travel by NCCL on GPUs; small decisions travel by gloo, so that no GPU waits for them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from fluidscale.record import Placement
from fluidscale.spec import InvalidInput

# Processes wait for the one that draws and judges longest, which takes hours for a large model.
_PATIENCE = timedelta(days=7)
# A process that does not come to the meeting in this time has died on its way.
_MEETING = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; a run of one process agrees with itself."""

    rank: int
    size: int
    environment: ClusterEnvironment
    host: Any = None  # the gloo group of all processes; None where there is one

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true where it is true in any process."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.host)
        return [bool(flag) for flag in raised]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on the CPU where there are several."""
        if self.size == 1:
            return values
        total = values.cpu()
        dist.all_reduce(total, group=self.host)
        return total

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier(group=self.host)


def is_started(placement: Placement) -> bool:
    """Whether something started all of the placement's processes, of which this is one."""
    return placement.processes == 1 or TorchElasticEnvironment.detect() or _tasks() == placement.processes


def _tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def join(placement: Placement, device: torch.device) -> Ranks:
    """This process's place among those of the run; meets the others first. A worker's next run finds them again.

    Raises InvalidInput when the processes that were started are not those of the placement.
    """
    if placement.processes == 1:
        # Found inside a SLURM job, Lightning would requeue it and resume by itself: both have their owner already.
        return Ranks(0, 1, LightningEnvironment())
    torchrun = TorchElasticEnvironment.detect()
    environment = TorchElasticEnvironment() if torchrun else SLURMEnvironment(auto_requeue=False)
    rank, size = environment.global_rank(), environment.world_size()
    if size != placement.processes:
        raise InvalidInput(
            f"the placement has {placement.nodes} node(s) x {placement.devices} devices, but {size} processes were "
            "started: start as many, one a device"
        )
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(environment.local_rank())
        # The processes of one node need no name service to find each other.
        address = "127.0.0.1" if placement.nodes == 1 and not torchrun else environment.main_address
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(environment.main_port)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=_MEETING)
    return Ranks(rank, size, environment, _host_group())


_group: list[Any] = []


def _host_group() -> Any:
    # One for the life of the process: a group is never given back.
    if not _group:
        _group.append(dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _group[0]
