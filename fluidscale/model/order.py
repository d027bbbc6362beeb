"""The order axis: what may be seen, which slot predicts which token, and what is written at each sampling step.

Pure index logic without parameters. An order never learns what a token is made of, and a head never learns in which
order tokens come: the two axes of the experiment do not meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fluidscale.spec import InvalidInput
from fluidscale.valid import check_inference_steps

START = -1  # a slot that reads this reads the learned start vector
MASK = -2  # a slot that reads this reads the learned mask vector


@dataclass(frozen=True)
class View:
    """What the transformer is shown. All int64 (B, S) but `counted`, bool (B, S).

    Slot s reads the content of token `reads[b, s]` (or START, MASK), stands at `positions[b, s]` and predicts the token
    there; `counted` says where that prediction is scored.
    """

    reads: Tensor
    positions: Tensor
    counted: Tensor

    @property
    def distinct_positions(self) -> Tensor:
        """(1, S) where all rows are one expanded row, else (B, S): position tables are then looked up once a batch."""
        return self.positions[:1] if self.positions.stride(0) == 0 or len(self.positions) == 1 else self.positions

    def rows(self, part: slice) -> View:
        """Some samples of the batch."""
        return View(self.reads[part], self.positions[part], self.counted[part])

    def since(self, slot: int) -> View:
        """The slots from `slot` on."""
        return View(self.reads[:, slot:], self.positions[:, slot:], self.counted[:, slot:])

    def twice(self) -> View:
        """The batch repeated once: the conditional and the unconditional branch of guidance."""
        distinct = self.distinct_positions
        positions = distinct.expand(2 * len(self.reads), -1) if len(distinct) == 1 else distinct.repeat(2, 1)
        return View(self.reads.repeat(2, 1), positions, self.counted.repeat(2, 1))


class Order(Protocol):
    """One way to factorise the joint distribution of an image's tokens."""

    @property
    def causal(self) -> bool:
        """True: slot s sees slots <= s only, so that sampling can keep keys and values."""
        ...

    def training_view(self, batch: int, length: int, rng: torch.Generator) -> View:
        """The view of one training step, on the generator's device."""
        ...

    def view(self, known: Tensor) -> View:
        """The view in which exactly `known`, bool (B, L), is known; it counts what can be predicted from that."""
        ...

    def steps(self, length: int, num_steps: int, permutations: Tensor) -> list[Tensor]:
        """Positions written at each sampling step, int64 (B, k_s); together each position once.

        `permutations`, int64 (B, L), is each image's own random order, for orders that want one.
        """
        ...


@dataclass(frozen=True)
class Raster:
    """Next token in raster order (GPT-like): slot s reads token s - 1 and predicts token s."""

    mask_law: str = "none"
    causal: bool = True

    def __post_init__(self) -> None:
        if self.mask_law != "none":
            raise InvalidInput(f"raster order masks nothing: mask_law must be none, got {self.mask_law!r}")

    def training_view(self, batch: int, length: int, rng: torch.Generator) -> View:
        return _prefix_view(batch, length, rng.device, counted=torch.ones(batch, length, dtype=torch.bool))

    def view(self, known: Tensor) -> View:
        """Shows each row's known prefix and counts its next token. Raises InvalidInput if `known` is no prefix."""
        batch, length = known.shape
        lengths = known.sum(1)
        slots = torch.arange(length, device=known.device)
        if not torch.equal(known, slots < lengths[:, None]):
            raise InvalidInput("raster order can only continue a prefix: the known tokens have a gap")
        size = min(int(lengths.max()) + 1, length)
        # Slots beyond a shorter row's next token stand after it, so causality keeps them out of sight.
        return _prefix_view(batch, size, known.device, counted=slots[:size] == lengths[:, None])

    def steps(self, length: int, num_steps: int, permutations: Tensor) -> list[Tensor]:
        """One token a step whatever `num_steps` says: the next one in raster order."""
        batch = len(permutations)
        return [torch.full((batch, 1), position, device=permutations.device) for position in range(length)]


def _prefix_view(batch: int, size: int, device: torch.device, counted: Tensor) -> View:
    positions = torch.arange(size, device=device).expand(batch, size)
    # Reading one token back makes slot 0 read -1, which is START.
    return View(positions - 1, positions, counted.to(device))


@dataclass(frozen=True)
class Random:
    """Any token from any others (BERT-like): slot s stands at s and reads token s, or MASK where it must predict."""

    mask_law: str
    causal: bool = False

    def __post_init__(self) -> None:
        if self.mask_law not in MASK_LAWS:
            raise InvalidInput(f"unknown mask_law {self.mask_law!r} for random order; known: {', '.join(MASK_LAWS)}")

    def training_view(self, batch: int, length: int, rng: torch.Generator) -> View:
        counts = MASK_LAWS[self.mask_law](batch, length, rng)
        ranks = torch.rand(batch, length, generator=rng, device=rng.device).argsort(1).argsort(1)
        return self.view(ranks >= counts[:, None])

    def view(self, known: Tensor) -> View:
        positions = torch.arange(known.shape[1], device=known.device).expand(known.shape)
        return View(torch.where(known, positions, MASK), positions, ~known)

    def steps(self, length: int, num_steps: int, permutations: Tensor) -> list[Tensor]:
        """Each image's own random order in `num_steps` groups that grow along MAR's cosine schedule."""
        return list(permutations.split(group_sizes(length, num_steps), dim=1))


def group_sizes(length: int, num_steps: int) -> list[int]:
    """Tokens written at each step: after step s floor(L cos(pi/2 (s+1)/K)) stay masked; at least one a step is written.

    Source: MAR's sampling code (arXiv 2406.11838), after MaskGIT. Raises InvalidInput unless 1 <= num_steps <= length.
    """
    check_inference_steps(num_steps, length)
    sizes, masked = [], length
    for step in range(num_steps):
        left = math.floor(length * math.cos(math.pi / 2 * (step + 1) / num_steps)) if step + 1 < num_steps else 0
        sizes.append(masked - min(left, masked - 1))
        masked -= sizes[-1]
    return sizes


# A mask law draws how many of `length` tokens each of `batch` samples must predict: int64 (B,), at least 1.
MaskLaw = Callable[[int, int, torch.Generator], Tensor]


def _cosine(batch: int, length: int, rng: torch.Generator) -> Tensor:
    u = torch.rand(batch, generator=rng, device=rng.device)
    return _masked(length, torch.cos(math.pi / 2 * u))


def _uniform(batch: int, length: int, rng: torch.Generator) -> Tensor:
    return torch.randint(1, length + 1, (batch,), generator=rng, device=rng.device)


def _mar(batch: int, length: int, rng: torch.Generator) -> Tensor:
    # MAR draws ONE ratio for the whole batch.
    return _mar_sample(1, length, rng).expand(batch)


def _mar_sample(batch: int, length: int, rng: torch.Generator) -> Tensor:
    # N(1, .25) truncated to [.7, 1], drawn through the inverse distribution.
    low, high = (0.5 * (1 + math.erf((bound - 1) / 0.25 / math.sqrt(2))) for bound in (0.7, 1.0))
    u = torch.rand(batch, generator=rng, device=rng.device)
    return _masked(length, 1 + 0.25 * torch.special.ndtri(low + u * (high - low)))


def _masked(length: int, ratio: Tensor) -> Tensor:
    return torch.ceil(length * ratio).long().clamp(1, length)


# cosine: MaskGIT (arXiv 2202.04200), ratio = cos(pi/2 u). uniform: every count 1..L alike, the law whose loss is the
# likelihood of the one-token-a-step sampler. mar: arXiv 2406.11838; mar_sample: the same with a ratio for each sample.
MASK_LAWS: dict[str, MaskLaw] = {"cosine": _cosine, "uniform": _uniform, "mar": _mar, "mar_sample": _mar_sample}

# A new order is one class and one entry; each is built from the spec's mask law.
ORDERS: dict[str, Callable[[str], Order]] = {"raster": Raster, "random": Random}
