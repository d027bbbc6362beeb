"""What one step of training sees and draws: the same for any number of processes and any size of their parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fluidscale.data.sampler import positions, samples_at
from fluidscale.data.sources import Rows
from fluidscale.model.build import FluidModel
from fluidscale.model.diffusion import Noise
from fluidscale.model.order import View
from fluidscale.record import Placement
from fluidscale.spec import InvalidInput, RunSpec

# Step, place in the global batch, stored tokens (B, L, ..), and the text's values (B, T, ..) and mask (B, T).
Batch = tuple[int, slice, torch.Tensor, torch.Tensor, torch.Tensor]
_CHUNK = 64  # steps whose data order is computed at once


@dataclass(frozen=True)
class Share:
    """What a process computes of each global batch: consecutive samples, in equal parts one after the other."""

    batch: int  # samples of the global batch
    rank: int = 0
    processes: int = 1
    parts: int = 1

    @property
    def size(self) -> int:
        """Samples of one part."""
        return self.batch // (self.processes * self.parts)

    @property
    def slices(self) -> list[slice]:
        """The samples of each part within the global batch."""
        first = self.rank * self.parts
        return [slice(k * self.size, (k + 1) * self.size) for k in range(first, first + self.parts)]


def share_of(batch: int, placement: Placement, rank: int = 0) -> Share:
    """The share of one process. Raises InvalidInput when the batch does not divide into equal parts."""
    each, rest = divmod(batch, placement.processes)
    parts, left = divmod(each, placement.micro_batch or max(each, 1))
    if rest or left or not each:
        raise InvalidInput(
            f"train.batch {batch} does not divide into {placement.processes} processes x micro-batches of "
            f"{placement.micro_batch or 'any size'}; change micro_batch or the number of devices in the profile"
        )
    return Share(batch, rank, placement.processes, parts)


class Batches:
    """This process's parts of the batches from step `start` to the run's last, from the memory-mapped rows."""

    def __init__(self, spec: RunSpec, rows: Rows, start: int, share: Share) -> None:
        self._spec, self._rows, self._start, self._share = spec, rows, start, share

    def __iter__(self) -> Iterator[Batch]:
        share, train = self._share, self._spec.train
        for first in range(self._start, train.steps, _CHUNK):
            steps = range(first, min(first + _CHUNK, train.steps))
            where = positions(train.batch, steps, share.rank, share.processes).reshape(-1, share.parts, share.size)
            rows, visits = samples_at(self._spec.seed, self._rows.rows, where), where // self._rows.rows
            for step, chosen, visit in zip(steps, rows, visits, strict=True):
                for k, part in enumerate(share.slices):
                    tokens, text = self._rows.gather(chosen[k], visit[k])
                    yield step, part, tokens, text.values, text.mask


def step_rng(seed: int, step: int) -> torch.Generator:
    """All randomness of one training step: equal across arms, sizes and restarts."""
    return torch.Generator().manual_seed((seed << 32) + step)


@dataclass(frozen=True)
class StepDraws:
    """Everything random in one step, for the whole global batch: each process draws all of it and uses its rows.

    That is what makes a run the same for any number of processes: a draw belongs to a sample's place in the batch.
    """

    drop: torch.Tensor  # bool (B,): the text is replaced by the null
    posterior: torch.Tensor | None  # (B, L, C): noise of the continuous tokens' posterior, drawn anew at every visit
    view: View
    noise: Noise | None  # of the counted slots, sample after sample

    def rows(self, part: slice) -> StepDraws:
        """The draws of some consecutive samples."""
        before, own = (int(self.view.counted[s].sum()) for s in (slice(0, part.start), part))
        noise = None if self.noise is None else self.noise.rows(slice(before, before + own))
        posterior = None if self.posterior is None else self.posterior[part]
        return StepDraws(self.drop[part], posterior, self.view.rows(part), noise)


def draw_step(model: FluidModel, spec: RunSpec, step: int) -> StepDraws:
    """The draws of a step, on the CPU, so that every device has the same."""
    rng, batch, length = step_rng(spec.seed, step), spec.train.batch, spec.model.num_tokens
    drop = torch.rand(batch, generator=rng) < spec.train.text_drop
    posterior = None
    if spec.model.token_channels:
        posterior = torch.randn(batch, length, spec.model.token_channels, generator=rng)
    view = model.order.training_view(batch, length, rng)
    return StepDraws(drop, posterior, view, model.draw(view, rng))


def visited(stored: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Tokens from stored ones: codes (B, L) as they are, moments (B, L, 2C) as a posterior sample (B, L, C) (MAR)."""
    if noise is None:
        return stored.long()
    mean, std = stored.float().chunk(2, dim=-1)
    return mean + std * noise.to(mean.device, non_blocking=True)
