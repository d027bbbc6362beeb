"""Parameters and FLOPs in closed form, by component, without building a model.

FLOPs are of matrix products and attention, 2 per multiply-add; elementwise work is left out, as is usual. Attention is
counted full even where it is causal. The backward pass counts twice the forward one.
"""

from __future__ import annotations

import math

from fluidscale.spec import DiffusionSpec, ModelSpec, RunSpec, SamplingSpec

# MAR (arXiv 2406.11838): 256 sinusoids enter the time embedding of the denoising head.
_TIME_FREQUENCIES = 256
# Distinct noise levels whose embedding one batch computes: eps has 1000 steps, continuous time shares 256 levels.
_LEVELS = {"eps": 1000, "v": 256, "flow": 256}


def params(spec: ModelSpec) -> dict[str, int]:
    """Parameters: embed (tokens, input positions), text (words, projection, aligner, null), body, head, total."""
    d, tokens = spec.width, spec.num_tokens
    slots = tokens + spec.buffer_tokens
    embed = (2 + slots) * d + (spec.vocab_size * d if spec.head is None else _linear(spec.token_channels, d))
    aligner = spec.aligner_depth * _block(spec, cross=False)
    text = spec.text_vocab_size * spec.text_width + _linear(spec.text_width, d) + spec.text_length * d + aligner + 3 * d
    # Position tables of each block: queries and keys of self-attention, queries of cross-attention.
    tables = {"input": 0, "every_layer": 2, "every_attention": 3}[spec.position]
    body = spec.depth * (_block(spec, cross=True) + tables * slots * d) + 2 * d
    head = _linear(d, spec.vocab_size) if spec.head is None else _denoiser(spec, spec.head)
    return {"embed": embed, "text": text, "body": body, "head": head, "total": embed + text + body + head}


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _block(spec: ModelSpec, cross: bool) -> int:
    d, hidden = spec.width, spec.mlp_ratio * spec.width
    attention = _linear(d, 3 * d) + _linear(d, d)
    crossing = _linear(d, d) + _linear(d, 2 * d) + _linear(d, d) + 2 * d if cross else 0
    return attention + crossing + _linear(d, hidden) + _linear(hidden, d) + 4 * d


def _outputs(spec: ModelSpec, head: DiffusionSpec) -> int:
    # eps learns a variance beside the noise.
    return spec.token_channels * (2 if head.objective == "eps" else 1)


def _denoiser(spec: ModelSpec, head: DiffusionSpec) -> int:
    w, n = head.width, head.num_blocks
    entry = _linear(_TIME_FREQUENCIES, w) + _linear(w, w) + _linear(spec.width, w) + _linear(spec.token_channels, w)
    blocks = n * (2 * _linear(w, w) + 2 * w) + _linear(w, (3 * n + 2) * w)
    return entry + blocks + _linear(w, _outputs(spec, head))


def mean_counted(spec: ModelSpec) -> float:
    """Tokens of an image that the training loss counts, in the mean over the mask law (exact, not estimated)."""
    tokens = spec.num_tokens
    if spec.mask_law == "none":
        return float(tokens)
    if spec.mask_law == "uniform":
        return (tokens + 1) / 2
    # E[ceil(L r)] = sum over k < L of P(r > k / L); at least one token is always masked.
    above = {"cosine": _above_cosine, "mar": _above_mar, "mar_sample": _above_mar}[spec.mask_law]
    return 1 + sum(above(k / tokens) for k in range(1, tokens))


def _above_cosine(ratio: float) -> float:
    """P(cos(pi/2 u) > ratio) for u ~ U(0, 1)."""
    return 2 / math.pi * math.acos(ratio)


def _above_mar(ratio: float) -> float:
    """P(r > ratio) for r ~ N(1, .25) truncated to [.7, 1]."""
    low, high, at = (_normal_cdf((x - 1) / 0.25) for x in (0.7, 1.0, max(ratio, 0.7)))
    return (high - at) / (high - low)


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def flops_per_image(spec: ModelSpec, batch: int | None = None) -> dict[str, float]:
    """Forward FLOPs of one image in training: text, body (token embedding included), head, total.

    The head is counted on the counted tokens (mean over the mask law) times the noise repeats. Time embeddings are
    shared by a batch; `batch` None is the limit of a large one, where their share is 0.
    """
    d, tokens, words = spec.width, spec.num_tokens, spec.text_length
    mlp = 2 * spec.mlp_ratio * d * d
    text = words * spec.text_width * d + spec.aligner_depth * (words * (4 * d * d + mlp) + 2 * words * words * d)
    slots = tokens + spec.buffer_tokens
    own = slots * 4 * d * d + 2 * slots * slots * d
    cross = slots * 2 * d * d + words * 2 * d * d + 2 * slots * words * d
    body = spec.depth * (own + cross + slots * mlp) + tokens * spec.token_channels * d
    counted = mean_counted(spec)
    head = counted * d * spec.vocab_size if spec.head is None else _denoising(spec, spec.head, counted, batch)
    parts = {"text": 2.0 * text, "body": 2.0 * body, "head": 2.0 * head}
    return {**parts, "total": sum(parts.values())}


def _denoising(spec: ModelSpec, head: DiffusionSpec, counted: float, batch: int | None) -> float:
    """Multiply-adds of the denoising head for `counted` tokens of one image."""
    w, rows = head.width, counted * head.noise_repeats
    levels = 0.0 if batch is None else min(rows, _LEVELS[head.objective] / batch)
    times = levels * (_TIME_FREQUENCIES * w + w * w)
    return counted * spec.width * w + rows * _denoising_row(spec, head) + times


def _denoising_row(spec: ModelSpec, head: DiffusionSpec) -> float:
    """Multiply-adds of one noisy token through the denoising head, its condition and time embedding given."""
    w, n = head.width, head.num_blocks
    return spec.token_channels * w + 2 * n * w * w + (3 * n + 2) * w * w + w * _outputs(spec, head)


def sampling_flops(spec: ModelSpec, sampling: SamplingSpec) -> float:
    """Forward FLOPs of drawing one image: what an evaluation costs, times its images.

    Both branches of guidance are counted. Raster order keeps keys and values, so each token passes the trunk once and
    attends to those before it; random order runs the trunk at every step, its last block only where something is to be
    written. Every token passes the head once, a denoising head once a step of its solver.
    """
    d, tokens, words = spec.width, spec.num_tokens, spec.text_length
    parts = flops_per_image(spec)
    branches = 1 if sampling.guidance_scale == 1 else 2
    keys = spec.depth * words * 2 * d * d  # of the text, once an image
    if spec.order == "raster":
        # Token k attends to k others, where training computes the full square. All are embedded at every step.
        trunk = parts["body"] / 2 - spec.depth * (tokens * tokens - tokens) * d
        trunk += (tokens - 1) * tokens * spec.token_channels * d
    else:
        slots = tokens + spec.buffer_tokens
        # What a slot costs in the last block behind its own keys and values.
        behind = (3 + 2 * spec.mlp_ratio) * d * d + 2 * (slots + words) * d
        left_out = sampling.num_inference_steps * slots - tokens
        trunk = keys + sampling.num_inference_steps * (parts["body"] / 2 - keys) - left_out * behind
    head = float(tokens * d * spec.vocab_size)
    if spec.head is not None:
        most = sampling.num_denoising_steps
        # Fewer for the last tokens, linear in between.
        steps = (most + (sampling.final_denoising_steps or most)) / 2
        per_token = steps * _denoising_row(spec, spec.head)
        head = tokens * (d * spec.head.width + per_token)
    return branches * (parts["text"] + 2.0 * trunk + 2.0 * head)


def train_flops(spec: RunSpec) -> float:
    """FLOPs of a whole run: 3 x forward x images (forward, and twice that backward)."""
    return 3 * flops_per_image(spec.model, spec.train.batch)["total"] * spec.images
