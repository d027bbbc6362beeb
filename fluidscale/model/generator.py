"""Drawing images: the order says which tokens come next, the head draws them, guidance compares two branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fluidscale.model.build import FluidModel
from fluidscale.model.draws import ImageDraws
from fluidscale.model.head import Guidance
from fluidscale.model.order import View
from fluidscale.model.transformer import Text
from fluidscale.spec import InvalidInput, SamplingSpec

Progress = Callable[[int, int], None]


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """On a GPU, float32 products by TF32 meanwhile: seven times as many a second by an H100's data sheet.

    MAR draws under autocast, with fewer digits still. Losses and likelihoods are measured in float32 throughout.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def generate(
    model: FluidModel,
    text: Text,
    sampling: SamplingSpec,
    seeds: Sequence[int],
    progress: Progress | None = None,
    scales: Sequence[float] | None = None,
) -> Tensor:
    """Tokens, int64 (B, L) or float (B, L, C), for B captions.

    Image i depends on its caption, seeds[i] and guidance only, never on the rest of the batch. `scales` are guidance
    scales of each image's own; None: the sampling's for all. Where all are 1 there is no unconditional branch;
    otherwise both branches run as one batch. `progress` is called with (steps done, all steps). Raises InvalidInput for
    settings that do not fit the model.
    """
    with tensor_cores(model.device):
        return _generate(model, text, sampling, seeds, progress, scales)


def _generate(
    model: FluidModel,
    text: Text,
    sampling: SamplingSpec,
    seeds: Sequence[int],
    progress: Progress | None,
    scales: Sequence[float] | None,
) -> Tensor:
    batch, length = len(seeds), model.spec.num_tokens
    if len(text.mask) != batch:
        raise InvalidInput(f"one seed per caption is needed: got {batch} seeds for {len(text.mask)} captions")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    permutations = torch.stack([torch.randperm(length, generator=rng) for rng in generators])
    steps = model.order.steps(length, sampling.num_inference_steps, permutations)
    sample = model.head.sampler(sampling)
    guidance = (
        sampling.guidance_scale if scales is None else torch.tensor(scales, dtype=torch.float32, device=model.device)
    )
    guided = any(scale != 1 for scale in scales or [sampling.guidance_scale])
    text, drop = _branches(text.to(model.device), guided)
    tokens, known = model.head.blank(batch, length, model.device), torch.zeros(batch, length, dtype=torch.bool)
    cache = model.trunk.new_cache(length)
    images = torch.arange(batch)[:, None]
    for done, written in enumerate(steps):
        view = model.order.view(known)
        slots = _slots(view, written)
        if guided:
            z, z_uncond = model(
                view.twice(), torch.cat([tokens, tokens]), text, drop, cache, slots.repeat(2, 1)
            ).flatten(0, 1).chunk(2)  # fmt: skip
        else:
            z, z_uncond = model(view, tokens, text, drop, cache, slots).flatten(0, 1), None
        share = float(known[0].float().mean())
        known[images, written] = True
        scale = SCHEDULES[sampling.guidance_schedule](guidance, length, int((~known[0]).sum()))
        if isinstance(scale, Tensor):
            scale = scale.repeat_interleave(written.shape[1])[:, None]
        drawn = sample(z, z_uncond, scale, ImageDraws(generators, written.shape[1], model.device), share)
        index = (images * length + written).flatten().to(model.device)
        tokens.flatten(0, 1)[index] = drawn.to(tokens.dtype)
        if progress is not None:
            progress(done + 1, len(steps))
    return tokens


# MAR's schedules of the guidance scale, from (scale, tokens, tokens still masked after this step). Its last step
# counts one token as still masked.
SCHEDULES: dict[str, Callable[[Guidance, int, int], Guidance]] = {
    "constant": lambda scale, length, masked: scale,
    "linear": lambda scale, length, masked: 1 + (scale - 1) * (length - max(masked, 1)) / length,
}


def _branches(text: Text, guided: bool) -> tuple[Text, Tensor | None]:
    """The captions, and behind them for guidance the same captions dropped."""
    if not guided:
        return text, None
    batch = len(text.mask)
    return text.twice(), torch.arange(2 * batch, device=text.mask.device) >= batch


def _slots(view: View, written: Tensor) -> Tensor:
    """The slots (B, k) that predict the tokens about to be written."""
    return (view.positions[:, None] == written[:, :, None]).int().argmax(-1)
