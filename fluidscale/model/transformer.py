"""One transformer for all arms: a text encoder, and pre-norm blocks of self-attention, cross-attention to text and MLP.

Parameters per block of width d: 4 d^2 self-attention, 4 d^2 cross-attention, 2 r d^2 MLP (r = 4); the aligner's blocks
have no cross-attention: 12 d^2. That is the count which explains Fluid's reported sizes (arXiv 2410.13863, Table 1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluidscale.model.order import MASK, View
from fluidscale.spec import ModelSpec

# MAR (arXiv 2406.11838).
NORM_EPS = 1e-6
EMBED_STD = 0.02
# Cross-attention's queries are of order 1 after a normed input; what tells their place starts larger. At .3 relations
# were learned late, at 1, 2 and 4 early (LOG.md).
QUERY_STD = 2.0
# RoPE for vision, axial form (arXiv 2403.13298): images are short sequences, so its base is 100 and not 10000.
ROTARY_BASE = 100.0
# On a CPU a text has a whole multiple of so many places: attention takes keys beyond one by one, and for 7 twice the
# time of 8 (`python benchmarks/text_keys.py`).
CPU_KEYS = 8


@dataclass(frozen=True)
class Text:
    """Captions: word ids int64 (B, T) (0 = padding) or features float (B, T, text_width), and a mask bool (B, T)."""

    values: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Text:
        return Text(self.values.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))

    def twice(self) -> Text:
        """The batch repeated once: the conditional and the unconditional branch of guidance."""
        return Text(torch.cat([self.values, self.values]), torch.cat([self.mask, self.mask]))


@dataclass
class LayerCache:
    """Keys and values that one block keeps between sampling steps, each (B, heads, length, head dim)."""

    text: tuple[Tensor, Tensor] | None = None
    own: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor, past: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Writes the new slots behind `past` earlier ones and returns all of them."""
        if self.own is None:
            batch, heads, _, size = keys.shape
            self.own = (keys.new_empty(batch, heads, capacity, size), keys.new_empty(batch, heads, capacity, size))
        end = past + keys.shape[2]
        self.own[0][:, :, past:end] = keys
        self.own[1][:, :, past:end] = values
        return self.own[0][:, :, :end], self.own[1][:, :, :end]


@dataclass
class Cache:
    """What sampling keeps between steps: the encoded text always, the slots already passed if the order is causal."""

    capacity: int
    layers: list[LayerCache]
    memory: Text | None = None
    length: int = 0


@dataclass(frozen=True)
class Place:
    """Where the slots stand, and who may see whom; the same for every block of one forward pass."""

    causal: bool
    past: int = 0
    capacity: int = 0
    positions: Tensor | None = None  # (1 or B, S): given where each block has its own position table
    rotary: tuple[Tensor, Tensor] | None = None  # (1 or B, S, 1, 1, head dim)
    mask: Tensor | None = field(default=None)  # bool (B, 1, 1, S): keys that exist

    def of(self, wanted: Tensor | None) -> Tensor | None:
        """The positions of all slots, or of those `wanted`, int64 (B, k)."""
        if wanted is None or self.positions is None:
            return self.positions
        return self.positions.expand(len(wanted), -1).gather(1, wanted)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Xavier-uniform weight, zero bias (MAR)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def table(*shape: int, std: float = EMBED_STD) -> nn.Parameter:
    """A learned vector, or a table of them, from N(0, std)."""
    parameter = nn.Parameter(torch.empty(*shape))
    nn.init.normal_(parameter, std=std)
    return parameter


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, ..) at the slots int64 (B, k): (B, k, ..)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def zero_(layer: nn.Linear) -> nn.Linear:
    """Starts a layer at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SelfAttention(nn.Module):
    """Multi-head self-attention; `num_positions` > 0 gives queries and keys a learned position table and RoPE."""

    def __init__(self, width: int, num_heads: int, num_positions: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.position = table(num_positions, 2 * width) if num_positions else None

    def forward(self, x: Tensor, place: Place, cache: LayerCache | None = None, wanted: Tensor | None = None) -> Tensor:
        batch, slots, width = x.shape
        qk, v = self.qkv(x).split([2 * width, width], dim=-1)
        qk = qk.view(batch, slots, 2, self.num_heads, -1)
        if self.position is not None and place.positions is not None and place.rotary is not None:
            learned = F.embedding(place.positions, self.position)
            qk = _rotate(qk + learned.view(-1, *qk.shape[1:]), *place.rotary)
        q, k = qk.permute(2, 0, 3, 1, 4)
        if wanted is not None:
            q = rows_of(q.transpose(1, 2), wanted).transpose(1, 2)
        v = v.view(batch, slots, self.num_heads, -1).transpose(1, 2)
        if place.causal and cache is not None:
            k, v = cache.extend(k, v, place.past, place.capacity)
        mixed = self._attend(q, k, v, place)
        return self.out(mixed.transpose(1, 2).reshape(batch, -1, width))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        if not place.causal:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=place.mask)
        if place.past == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(place.past)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible if q.shape[2] > 1 else None)


class CrossAttention(nn.Module):
    """Image slots attend to text; the text's keys and values are computed once per image when sampling.

    `num_positions` > 0 gives the queries a learned position table: which word matters to a slot depends on its place.
    """

    def __init__(self, width: int, num_heads: int, num_positions: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.out = linear(width, width), linear(width, 2 * width), linear(width, width)
        self.position = table(num_positions, width, std=QUERY_STD) if num_positions else None

    def forward(
        self, x: Tensor, text: Text, positions: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, S, d) for slots (B, S, d) at `positions`, int64 (1 or B, S)."""
        batch, slots, width = x.shape
        q = self.q(x)
        if self.position is not None and positions is not None:
            q = q + F.embedding(positions, self.position)
        q = q.view(batch, slots, self.num_heads, -1).transpose(1, 2)
        if cache is not None and cache.text is not None:
            k, v = cache.text
        else:
            heads = self.kv(text.values).view(batch, -1, 2, self.num_heads, width // self.num_heads)
            k, v = heads.permute(2, 0, 3, 1, 4)
            if cache is not None:
                cache.text = (k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=text.mask[:, None, None])
        return self.out(mixed.transpose(1, 2).reshape(batch, slots, width))


class Block(nn.Module):
    """A pre-norm residual block; without `cross` it is a block of the text aligner."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: int, cross: bool, num_positions: int = 0, query_positions: int = 0
    ) -> None:
        """Position tables of self-attention and of cross-attention's queries, where they have rows."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = SelfAttention(width, num_heads, num_positions)
        self.cross_norm = nn.LayerNorm(width, eps=NORM_EPS) if cross else None
        self.cross = CrossAttention(width, num_heads, query_positions) if cross else None
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(linear(width, mlp_ratio * width), nn.GELU(), linear(mlp_ratio * width, width))

    def forward(
        self,
        x: Tensor,
        place: Place,
        text: Text | None = None,
        cache: LayerCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, S, d), or (B, k, d) of the slots `wanted`, int64 (B, k), which still see all of them."""
        mixed = self.attention(self.attention_norm(x), place, cache, wanted)
        x = (x if wanted is None else rows_of(x, wanted)) + mixed
        if self.cross is not None and self.cross_norm is not None and text is not None:
            x = x + self.cross(self.cross_norm(x), text, place.of(wanted), cache)
        return x + self.mlp(self.mlp_norm(x))


class TextEncoder(nn.Module):
    """Words or frozen features to what the image attends to: projection, positions, aligner blocks; the null text."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.words = nn.Embedding(spec.text_vocab_size, spec.text_width) if spec.text_vocab_size else None
        if self.words is not None:
            nn.init.normal_(self.words.weight, std=spec.text_init_std)
        self.project = linear(spec.text_width, spec.width)
        self.position = table(spec.text_length, spec.width, std=spec.text_init_std)
        self.blocks = nn.ModuleList(
            Block(spec.width, spec.num_heads, spec.mlp_ratio, cross=False) for _ in range(spec.aligner_depth)
        )
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.null = table(spec.width)

    def forward(self, text: Text, drop: Tensor | None) -> Text:
        """Features (B, T, width) and their mask; a dropped or empty caption becomes the null vector at every place."""
        empty = ~text.mask.any(1, keepdim=True)
        if drop is not None:
            empty = empty | drop[:, None]
        # Attending to one vector T times equals attending to it once, and no row is left without a key.
        mask = text.mask | empty
        values = text.values if self.words is None else self.words(text.values.long())
        x = self.project(values.to(self.project.weight.dtype)) + self.position[: mask.shape[1]]
        if x.device.type == "cpu" and (short := -x.shape[1] % CPU_KEYS):
            x, mask = F.pad(x, (0, 0, 0, short)), F.pad(mask, (0, short)) | empty
        place = Place(causal=False, mask=mask[:, None, None])
        for block in self.blocks:
            x = block(x, place)
        x = self.norm(x)
        return Text(torch.where(empty[..., None], self.null.to(x.dtype), x), mask)


class Trunk(nn.Module):
    """The image transformer: embedded tokens in, one vector z per slot out.

    With `encoder_depth` its first blocks are MAR's encoder (arXiv 2406.11838): the known tokens see each other and the
    buffer tokens alone, and the mask tokens enter after them. Their slots are computed all along and thrown away, so
    that every sample may have its own number of known tokens; MAR leaves them out.
    """

    def __init__(self, spec: ModelSpec, causal: bool) -> None:
        super().__init__()
        self.causal, self.grid, self.head_dim = causal, spec.grid, spec.width // spec.num_heads
        self.encoder_depth, self.num_buffers = spec.encoder_depth, spec.buffer_tokens
        slots = spec.num_tokens + spec.buffer_tokens  # the buffers' positions come last
        everywhere = slots if spec.position != "input" else 0
        asking = slots if spec.position == "every_attention" else 0
        self.special = table(2, spec.width)  # read by START and MASK
        self.position = table(slots, spec.width)
        self.blocks = nn.ModuleList(
            Block(spec.width, spec.num_heads, spec.mlp_ratio, True, num_positions=everywhere, query_positions=asking)
            for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.rotary = bool(everywhere)

    def forward(
        self, embedded: Tensor, view: View, text: Text, cache: Cache | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """z (B, S, d) from embedded tokens (B, L, d). With a cache and a causal order, of the new slots only.

        `wanted`, int64 (B, k), names slots of the view: z (B, k, d) of these alone.
        """
        past = cache.length if cache is not None and self.causal else 0
        view = view.since(past)
        x, positions = self._entered(embedded, view)
        place = Place(self.causal, past, cache.capacity if cache is not None else 0)
        if self.rotary:
            angles = rotary_table(self.grid, self.head_dim, self.num_buffers, x.device)
            cos, sin = (t[positions][:, :, None, None] for t in angles)
            place = Place(self.causal, past, place.capacity, positions, (cos, sin))
        layers = cache.layers if cache is not None else [None] * len(self.blocks)
        split = self.encoder_depth
        if split:
            x = self._encoded(x, view, text, place, layers)
        if cache is not None:
            cache.length = past + x.shape[1]
        if wanted is not None:
            wanted = wanted.to(x.device) + self.num_buffers - past
        *before, (last, its_cache) = zip(self.blocks[split:], layers[split:], strict=True)
        for block, layer in before:
            x = block(x, place, text, layer)
        # Nobody reads the last block's slots but the head. (A causal order's new slots are few, and wanted anyway.)
        early = None if self.causal else wanted
        x = last(x, place, text, its_cache, early)
        if wanted is None:
            return self.norm(x)[:, self.num_buffers :]
        return self.norm(x if early is not None else rows_of(x, wanted))

    def _entered(self, embedded: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """What the first block is given, and where it stands. A buffer is, at first, its position alone."""
        positions = view.distinct_positions.to(embedded.device, non_blocking=True)
        x = self._read(embedded, view.reads)
        if self.num_buffers:
            own = torch.arange(len(self.position) - self.num_buffers, len(self.position), device=embedded.device)
            positions = torch.cat([own.expand(len(positions), -1), positions], dim=1)
            x = F.pad(x, (0, 0, self.num_buffers, 0))
        return x + F.embedding(positions, self.position), positions

    def _encoded(self, x: Tensor, view: View, text: Text, place: Place, layers: Sequence[LayerCache | None]) -> Tensor:
        """What the encoder makes of buffers and known tokens (of all slots, where nothing is known); the rest of x."""
        known = view.reads != MASK
        if not self.num_buffers:
            known = known | ~known.any(1, keepdim=True)
        seen = F.pad(known, (self.num_buffers, 0), value=True).to(x.device, non_blocking=True)
        inside, encoded = replace(place, mask=seen[:, None, None]), x
        for block, layer in zip(self.blocks[: self.encoder_depth], layers, strict=False):
            encoded = block(encoded, inside, text, layer)
        return torch.where(seen[..., None], encoded, x)

    def _read(self, embedded: Tensor, reads: Tensor) -> Tensor:
        batch, length, width = embedded.shape
        # One table of all tokens of the batch, then START and MASK (-1 and -2 count from its end, mirrored).
        rows = torch.cat([embedded.reshape(batch * length, width), self.special.flip(0).to(embedded.dtype)])
        offsets = torch.arange(batch, device=reads.device)[:, None] * length
        index = torch.where(reads >= 0, reads + offsets, reads + len(rows))
        return F.embedding(index.to(embedded.device, non_blocking=True), rows)

    def new_cache(self, capacity: int) -> Cache:
        return Cache(capacity, [LayerCache() for _ in self.blocks])


@functools.cache
def rotary_table(grid: int, head_dim: int, buffers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (grid * grid + buffers, head dim): half of the pairs turn with the row, half with the
    column; buffers stand nowhere and do not turn."""
    pairs = head_dim // 4
    frequency = ROTARY_BASE ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    place = torch.arange(grid, dtype=torch.float64, device="cpu")
    row = (place[:, None] * frequency)[:, None].expand(grid, grid, pairs)
    column = (place[:, None] * frequency)[None].expand(grid, grid, pairs)
    angle = F.pad(torch.cat([row, column], dim=-1).reshape(grid * grid, 2 * pairs), (0, 0, 0, buffers))
    cos, sin = torch.cos(angle), torch.sin(angle)
    signed = torch.cat([-sin, sin], dim=-1)
    return torch.cat([cos, cos], dim=-1).float().to(device), signed.float().to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Channel i turns with channel i + half; the sine carries the sign, so a roll is the partner's channel.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
