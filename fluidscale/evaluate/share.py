"""Which images of a set one process of several works on: every image once, whatever the number of processes.

A distributed sampler that repeats samples until all ranks have equally many changes a Fréchet distance. Here images
are dealt by their index, and results are put back in that order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """The part of process `rank` of `ranks`. With more than one, all of them must make the same calls."""

    rank: int = 0
    ranks: int = 1
    group: Any = field(default=None, compare=False)  # torch.distributed's, of all of them; None: the default one

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `ranks`-th item, beginning at `rank`."""
        return items[self.rank :: self.ranks]

    def gathered(self, part: np.ndarray) -> np.ndarray:
        """The rows (n, ..) of all processes in the order of the images, from this process's own."""
        if self.ranks == 1:
            return part
        import torch.distributed as dist

        parts: list = [None] * self.ranks
        dist.all_gather_object(parts, part, group=self.group)
        whole = np.empty((sum(map(len, parts)), *part.shape[1:]), part.dtype)
        for rank, rows in enumerate(parts):
            whole[rank :: self.ranks] = rows
        return whole

    def agreed(self, value: Value) -> Value:
        """The first process's value: what it found on disk, another may not see yet."""
        if self.ranks == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def wait(self) -> None:
        """Until every process is here: files of the others may then be read."""
        if self.ranks > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)


def share_of_environment() -> Share:
    """The share that torchrun (RANK, WORLD_SIZE) gives this process; alone, all of it. Joins the process group."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return Share()
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        # "cuda" is then this process's own GPU, wherever it is said.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not dist.is_initialized():
        # Only arrays on the host are exchanged.
        dist.init_process_group("gloo")
    return Share(dist.get_rank(), ranks)
