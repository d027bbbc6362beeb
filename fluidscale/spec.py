"""What a run is: frozen, fully resolved numbers, and the identity that follows from them.

Identity is what was asked, never where it ran: paths, devices and micro-batches belong to the placement and are not
hashed. A field added after a release is left out of the hash while it holds its default, so old ids survive.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any

from fluidscale.limits import (
    Amount,
    AtLeastOne,
    Count,
    Decay,
    InvalidInput,
    OneOf,
    Positive,
    Range,
    Share,
)
from fluidscale.objects import CLASSES, COLORS

TOKEN_KINDS = ("continuous", "discrete")
ORDERS = ("random", "raster")
MASK_LAWS = ("cosine", "uniform", "mar", "mar_sample")  # of random order: model/order.py
# Where a slot's place is told: at the input alone; also to the queries and keys of every self-attention (learned, with
# 2-D rotary angles); also to the queries of every cross-attention to the text (learned).
POSITIONS = ("input", "every_layer", "every_attention")
# Which solvers draw tokens with a denoising head of each objective: model/solvers.py.
SOLVERS = {
    "eps": ("ddpm", "ddpm_clamped", "ddim", "dpmpp_2m"),
    "v": ("ddim", "dpmpp_2m"),
    "flow": ("dpmpp_2m", "euler"),
}
# MAR: cosine schedule over 1000 steps; all networks see time in these units, and an ancestral solver takes no more.
TIME_STEPS = 1000
DECAY_SHAPES = ("linear", "cosine")
GUIDANCE_SCHEDULES = ("constant", "linear")
# The jackknife of a Fréchet distance leaves out half of the fewest images, and a covariance needs two.
LEAST_FD_IMAGES = 4
ARMS = tuple(f"{kind}-{order}" for kind in TOKEN_KINDS for order in ORDERS)

# Fields added after the first release: absent from the canonical form while they hold their default.
_ADDED_LATER: dict[str, set[str]] = {
    "RunSpec": {"text_encoder_sha256"},
    "DataSpec": {"val_manifest_sha256"},
    "ModelSpec": {"encoder_depth", "buffer_tokens", "text_init_std"},
    "TrainSpec": {"decay_shape", "decay_head", "lr_vectors"},
    "SamplingSpec": {"final_denoising_steps"},
    "EvaluateSpec": {"stepwise_images", "geneval_unseen", "judges", "geneval_prompts_sha256", "fid_prompts_sha256"},
}

# A step's draws come from (seed << 32) + step, in 64 bits.
Seed = Annotated[int, Range(least=0, below=2**32)]


@dataclass(frozen=True)
class DiffusionSpec:
    """The denoising head of a continuous arm (MAR, arXiv 2406.11838)."""

    width: AtLeastOne
    num_blocks: AtLeastOne
    # eps: MAR's prediction of the noise, with learned sigma; v: cosine VP; flow: linear path, velocity.
    objective: Annotated[str, OneOf(tuple(SOLVERS))] = "v"
    noise_repeats: AtLeastOne = 4  # MAR's diffusion_batch_mul: fresh (t, noise) draws per token


@dataclass(frozen=True)
class ModelSpec:
    """One transformer with its two ends. Widths in channels, lengths in tokens."""

    token_kind: Annotated[str, OneOf(TOKEN_KINDS)]
    order: Annotated[str, OneOf(ORDERS)]
    depth: AtLeastOne
    width: AtLeastOne
    num_heads: AtLeastOne
    grid: AtLeastOne  # tokens per image side; the sequence has grid * grid tokens
    token_channels: Count  # continuous: channels of one token; discrete: 0
    vocab_size: Count  # discrete: codes of the tokenizer; continuous: 0
    text_vocab_size: Count  # > 0: words are embedded by the model; 0: features come from a frozen encoder
    text_width: AtLeastOne  # width of the text features that enter the aligner
    text_length: AtLeastOne
    aligner_depth: Count
    mlp_ratio: AtLeastOne = 4
    position: Annotated[str, OneOf(POSITIONS)] = "input"
    mask_law: Annotated[str, OneOf(("none", *MASK_LAWS))] = "none"  # raster: none
    head: DiffusionSpec | None = None  # None: softmax
    encoder_depth: Count = 0  # random: of `depth`, the blocks before mask tokens enter (MAR's encoder); 0: one stack
    buffer_tokens: Count = 0  # random: learned vectors before the image's tokens, which every slot sees (MAR: 64)
    # Of embedded words (where the model embeds them) and of their places, at the start. A block's first output is of
    # order 1: beside MAR's .02 it drowns which word stands where.
    text_init_std: Amount = 0.02

    @property
    def num_tokens(self) -> int:
        return self.grid * self.grid

    @property
    def arm(self) -> str:
        return f"{self.token_kind}-{self.order}"


@dataclass(frozen=True)
class WorldSpec:
    """Settings of the embedded world: one world, made small or large by these numbers."""

    resolution: Annotated[int, Range(least=8)]
    classes: tuple[Annotated[str, OneOf(CLASSES)], ...]
    colors: tuple[Annotated[str, OneOf(tuple(COLORS))], ...]
    max_objects: Annotated[int, Range(least=2, most=4)]
    icon_sizes: tuple[Annotated[int, Range(least=4)], ...]  # side in px for scenes of 1, 2, .. max_objects icons
    size_jitter: Annotated[float, Range(least=0, below=1)] = 0.0  # icons are scaled by 1 +- this, uniformly
    rotation_degrees: Annotated[float, Range(least=0, most=45)] = 0.0  # icons are rotated by +- this, uniformly
    position_step: AtLeastOne = 1  # centres lie on a grid of this many px
    holdout_fraction: Annotated[float, Range(least=0, most=0.5)] = 0.2
    seed: Count = 0


@dataclass(frozen=True)
class DataSpec:
    """The images: an embedded world, or shards named by the hash of their manifest, with or without other shards whose
    images validate."""

    name: str
    images_unique: AtLeastOne
    world: WorldSpec | None = None
    manifest_sha256: str | None = None
    val_manifest_sha256: str | None = None  # whose validation images are used; None: those of `manifest_sha256`


@dataclass(frozen=True)
class TrainSpec:
    """Warm-up, stable, decay: the rate is constant from warmup_steps to branch_step, then falls to 0."""

    lr: Positive
    batch: AtLeastOne
    steps: AtLeastOne
    decay_steps: Count
    warmup_steps: Count
    weight_decay: Amount
    beta1: Decay
    beta2: Decay
    grad_clip: Positive
    ema_decay: Decay
    text_drop: Share
    decay_shape: Annotated[str, OneOf(DECAY_SHAPES)] = "linear"  # cosine: half a period
    decay_head: bool = True  # whether weight decay acts on the denoising head; MAR leaves it out
    # The rate of embeddings, places, biases and gains: of all but linear maps' matrices. None: `lr`, as in MAR.
    lr_vectors: Positive | None = None

    @property
    def branch_step(self) -> int:
        """The step at which this run leaves its trunk and begins to cool down."""
        return self.steps - self.decay_steps


@dataclass(frozen=True)
class SamplingSpec:
    """How images are drawn from a trained model."""

    guidance_scale: Amount
    temperature: Amount
    num_inference_steps: AtLeastOne  # autoregressive steps; raster: one per token
    guidance_schedule: Annotated[str, OneOf(GUIDANCE_SCHEDULES)] = "constant"  # linear: MAR's
    num_denoising_steps: Count = 0  # continuous: steps of the head's solver; discrete: 0
    solver: str = "none"  # continuous: ddpm | ddpm_clamped | ddim | dpmpp_2m | euler; discrete: none
    final_denoising_steps: Count = 0  # DiSA: solver steps of the last tokens, linear in the known ones; 0: as the first


@dataclass(frozen=True)
class EvaluateSpec:
    """What is measured at the end of a run; a count of 0 leaves that measurement out."""

    sampling: SamplingSpec
    val_images: Count
    geneval_images_per_prompt: Count
    fd_images: Count
    stepwise_images: Count = 256  # of the two likelihoods along a schedule, at most val_images
    geneval_unseen: bool = True  # whether prompts of combinations held out of training are drawn too
    # Of a run on real images: which published judges look at what it draws (published.JUDGES), and at which prompts.
    judges: tuple[str, ...] = ()
    geneval_prompts_sha256: str = ""
    fid_prompts_sha256: str = ""


@dataclass(frozen=True)
class RunSpec:
    """One run: everything that decides its result, and nothing else."""

    size: str
    seed: Seed
    model: ModelSpec
    tokenizer_sha256: str
    text_encoder: str
    data: DataSpec
    train: TrainSpec
    evaluate: EvaluateSpec
    text_encoder_sha256: str = ""  # of a frozen encoder; empty: the model embeds words itself

    @property
    def arm(self) -> str:
        return self.model.arm

    @property
    def images(self) -> int:
        """Training images seen, repetitions counted."""
        return self.train.batch * self.train.steps

    # Hashed once: status over a thousand runs asks for both ids many times.
    @cached_property
    def id(self) -> str:
        """A slug for people and a hash for programs, e.g. `continuous-random-369M-9f31c2ab7e`."""
        return f"{self.arm}-{self.size}-{digest(self)[:10]}"

    @cached_property
    def trunk_id(self) -> str:
        """Names the constant-rate trajectory: runs that differ only in length or evaluation share it."""
        content = canonical(self)
        del content["evaluate"], content["train"]["steps"], content["train"]["decay_steps"]
        content["data"].pop("val_manifest_sha256", None)
        return f"trunk-{self.arm}-{self.size}-{_sha(content)[:10]}"


def canonical(value: Any) -> Any:
    """The JSON form that is hashed: sorted keys, plain types. Raises TypeError on a value without such a form."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        later = _ADDED_LATER.get(type(value).__name__, set())
        return {
            f.name: canonical(getattr(value, f.name))
            for f in fields(value)
            if not (f.name in later and getattr(value, f.name) == f.default)
        }
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no canonical form")
        # 1 and 1.0 are the same number, however a YAML file spells it.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, (tuple, list)):
        return [canonical(v) for v in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: canonical(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} has no canonical form")


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of any spec."""
    return _sha(canonical(value))


def to_json(spec: RunSpec) -> str:
    """The spec as a file a person can read."""
    return json.dumps(canonical(spec), indent=1, sort_keys=True) + "\n"


__all__ = [
    "ARMS",
    "DECAY_SHAPES",
    "GUIDANCE_SCHEDULES",
    "LEAST_FD_IMAGES",
    "MASK_LAWS",
    "ORDERS",
    "SOLVERS",
    "TIME_STEPS",
    "TOKEN_KINDS",
    "DataSpec",
    "DiffusionSpec",
    "EvaluateSpec",
    "InvalidInput",
    "ModelSpec",
    "RunSpec",
    "SamplingSpec",
    "Seed",
    "TrainSpec",
    "WorldSpec",
    "canonical",
    "digest",
    "to_json",
]
