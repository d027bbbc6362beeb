"""From a ModelSpec to a model: an arm is a pair of values, an order and a head."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fluidscale.model.diffusion import Noise
from fluidscale.model.head import HEADS
from fluidscale.model.order import ORDERS, View
from fluidscale.model.transformer import Cache, Text, TextEncoder, Trunk
from fluidscale.spec import ModelSpec
from fluidscale.valid import check_model


class FluidModel(nn.Module):
    """Text, trunk, order and head of one arm. Tokens are int64 (B, L) codes or float (B, L, C)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.order = ORDERS[spec.order](spec.mask_law)
        self.head = HEADS[spec.token_kind](spec)
        self.text = TextEncoder(spec)
        self.trunk = Trunk(spec, self.order.causal)

    @property
    def device(self) -> torch.device:
        return self.trunk.position.device

    def forward(
        self, view: View, tokens: Tensor, text: Text, drop: Tensor | None = None, cache: Cache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """z (B, S, d) for every slot of the view, or (B, k, d) of the slots `wanted`, int64 (B, k); `drop` bool (B,)
        replaces a sample's text by the null.

        With a cache the text is encoded once, and a causal order returns z of the slots new since the last call.
        """
        memory = cache.memory if cache is not None else None
        if memory is None:
            drop = None if drop is None else drop.to(self.device, non_blocking=True)
            memory = self.text(text.to(self.device), drop)
        if cache is not None:
            cache.memory = memory
        return self.trunk(self.head.embed(tokens.to(self.device, non_blocking=True)), view, memory, cache, wanted)

    def losses(
        self, tokens: Tensor, text: Text, view: View, rng: torch.Generator, drop: Tensor | None = None,
        stratified: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Each slot's training loss, float32 (B, S), 0 where it does not count; and where it counts, bool (B, S)."""
        return self.losses_under(self.draw(view, rng, stratified), tokens, text, view, drop)

    def draw(self, view: View, rng: torch.Generator, stratified: bool = False) -> Noise | None:
        """The head's draws for the counted slots of a view, in their order."""
        return self.head.draw(int(view.counted.sum()), rng, stratified)

    def losses_under(
        self, noise: Noise | None, tokens: Tensor, text: Text, view: View, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`losses` under draws that were made before, for this view or for a batch of which it is a part."""
        tokens = tokens.to(self.device, non_blocking=True)
        rows, z, targets = self._counted(tokens, text, view, drop)
        scores = self.head.losses(z, targets, noise)
        return _scattered(scores, rows, view), view.counted.to(self.device, non_blocking=True)

    def nll(self, tokens: Tensor, text: Text, view: View, rng: torch.Generator) -> Tensor:
        """Nats of each slot's token, float32 (B, S), 0 where it does not count."""
        rows, z, targets = self._counted(tokens.to(self.device, non_blocking=True), text, view, None)
        return _scattered(self.head.nll(z, targets, rng), rows, view)

    def _counted(self, tokens: Tensor, text: Text, view: View, drop: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers (M,), z (M, d) and tokens (M, ..) of the counted slots: heads see nothing else.

        Found where the view lives: with a view on the CPU a GPU is never waited for.
        """
        batch, length = tokens.shape[:2]
        rows = view.counted.flatten().nonzero().squeeze(1)
        offsets = torch.arange(batch, device=rows.device)[:, None] * length
        targets = (view.positions + offsets).flatten()[rows].to(self.device, non_blocking=True)
        rows = rows.to(self.device, non_blocking=True)
        # Not self(..): a sharded model gathers its parameters once for all of `losses_under`, not again in here.
        z = self.forward(view, tokens, text, drop)
        return rows, z.flatten(0, 1).index_select(0, rows), tokens.flatten(0, 1).index_select(0, targets)


def _scattered(scores: Tensor, rows: Tensor, view: View) -> Tensor:
    blank = torch.zeros(view.counted.numel(), dtype=scores.dtype, device=scores.device)
    return blank.index_copy(0, rows, scores).view(view.counted.shape)


def build(spec: ModelSpec) -> FluidModel:
    """A model with fresh weights from torch's global generator, on the current default device (`meta` included).

    Raises InvalidInput for a spec that no model can be built from.
    """
    check_model(spec)
    return FluidModel(spec)


def load_model(spec: ModelSpec, weights: Path) -> FluidModel:
    """A model with the weights of a safetensors file, in evaluation mode: they are in memory once, and nothing else is.

    Raises what safetensors and torch raise when the file is damaged or of another model.
    """
    with torch.device("meta"):
        model = build(spec)
    model.to_empty(device="cpu")
    model.load_state_dict(load_file(weights))
    return model.eval()
