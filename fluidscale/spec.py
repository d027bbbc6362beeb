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
from typing import Any, TypeVar

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
ARMS = tuple(f"{kind}-{order}" for kind in TOKEN_KINDS for order in ORDERS)

# Fields added after the first release: absent from the canonical form while they hold their default.
_ADDED_LATER: dict[str, set[str]] = {
    "RunSpec": {"text_encoder_sha256"},
    "ModelSpec": {"encoder_depth", "buffer_tokens", "text_init_std"},
    "TrainSpec": {"decay_shape", "decay_head", "lr_vectors"},
    "SamplingSpec": {"final_denoising_steps"},
    "EvaluateSpec": {"stepwise_images", "geneval_unseen", "judges", "geneval_prompts_sha256", "fid_prompts_sha256"},
}

T = TypeVar("T")


class InvalidInput(ValueError):
    """The user's input cannot be used; the message says what, where and the way out (exit code 2)."""


@dataclass(frozen=True)
class DiffusionSpec:
    """The denoising head of a continuous arm (MAR, arXiv 2406.11838)."""

    width: int
    num_blocks: int
    objective: str = "v"  # eps (MAR: eps-prediction with learned sigma) | v (cosine VP) | flow (linear path, velocity)
    noise_repeats: int = 4  # MAR's diffusion_batch_mul: fresh (t, noise) draws per token


@dataclass(frozen=True)
class ModelSpec:
    """One transformer with its two ends. Widths in channels, lengths in tokens."""

    token_kind: str
    order: str
    depth: int
    width: int
    num_heads: int
    grid: int  # tokens per image side; the sequence has grid * grid tokens
    token_channels: int  # continuous: channels of one token; discrete: 0
    vocab_size: int  # discrete: codes of the tokenizer; continuous: 0
    text_vocab_size: int  # > 0: words are embedded by the model; 0: features come from a frozen encoder
    text_width: int  # width of the text features that enter the aligner
    text_length: int
    aligner_depth: int
    mlp_ratio: int = 4
    position: str = "input"  # one of POSITIONS
    mask_law: str = "none"  # raster: none; random: one of MASK_LAWS
    head: DiffusionSpec | None = None  # None: softmax
    encoder_depth: int = 0  # random: of `depth`, the blocks before mask tokens enter (MAR's encoder); 0: one stack
    buffer_tokens: int = 0  # random: learned vectors before the image's tokens, which every slot sees (MAR: 64)
    # Of embedded words (where the model embeds them) and of their places, at the start. A block's first output is of
    # order 1: beside MAR's .02 it drowns which word stands where.
    text_init_std: float = 0.02

    @property
    def num_tokens(self) -> int:
        return self.grid * self.grid

    @property
    def arm(self) -> str:
        return f"{self.token_kind}-{self.order}"


@dataclass(frozen=True)
class WorldSpec:
    """Settings of the embedded world: one world, made small or large by these numbers."""

    resolution: int
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    max_objects: int
    icon_sizes: tuple[int, ...]  # side in px for scenes of 1, 2, .. max_objects icons
    size_jitter: float = 0.0  # icons are scaled by 1 +- this, uniformly
    rotation_degrees: float = 0.0  # icons are rotated by +- this, uniformly
    position_step: int = 1  # centres lie on a grid of this many px
    holdout_fraction: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class DataSpec:
    """The training images: an embedded world, or shards named by the hash of their manifest."""

    name: str
    images_unique: int
    world: WorldSpec | None = None
    manifest_sha256: str | None = None


@dataclass(frozen=True)
class TrainSpec:
    """Warm-up, stable, decay: the rate is constant from warmup_steps to branch_step, then falls to 0."""

    lr: float
    batch: int
    steps: int
    decay_steps: int
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    ema_decay: float
    text_drop: float
    decay_shape: str = "linear"  # linear | cosine (half a period)
    decay_head: bool = True  # whether weight decay acts on the denoising head; MAR leaves it out
    # The rate of embeddings, places, biases and gains: of all but linear maps' matrices. None: `lr`, as in MAR.
    lr_vectors: float | None = None

    @property
    def branch_step(self) -> int:
        """The step at which this run leaves its trunk and begins to cool down."""
        return self.steps - self.decay_steps


@dataclass(frozen=True)
class SamplingSpec:
    """How images are drawn from a trained model."""

    guidance_scale: float
    temperature: float
    num_inference_steps: int  # autoregressive steps; raster: one per token
    guidance_schedule: str = "constant"  # constant | linear (MAR)
    num_denoising_steps: int = 0  # continuous: steps of the head's solver; discrete: 0
    solver: str = "none"  # continuous: ddpm | ddpm_clamped | ddim | dpmpp_2m | euler; discrete: none
    final_denoising_steps: int = 0  # DiSA: solver steps of the last tokens, linear in the known ones; 0: as the first


@dataclass(frozen=True)
class EvaluateSpec:
    """What is measured at the end of a run; a count of 0 leaves that measurement out."""

    sampling: SamplingSpec
    val_images: int
    geneval_images_per_prompt: int
    fd_images: int
    stepwise_images: int = 256  # of the two likelihoods along a schedule, at most val_images
    geneval_unseen: bool = True  # whether prompts of combinations held out of training are drawn too
    # Of a run on real images: which published judges look at what it draws (published.JUDGES), and at which prompts.
    judges: tuple[str, ...] = ()
    geneval_prompts_sha256: str = ""
    fid_prompts_sha256: str = ""


@dataclass(frozen=True)
class RunSpec:
    """One run: everything that decides its result, and nothing else."""

    size: str
    seed: int
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


_NESTED: dict[tuple[str, str], type] = {
    ("RunSpec", "model"): ModelSpec,
    ("RunSpec", "data"): DataSpec,
    ("RunSpec", "train"): TrainSpec,
    ("RunSpec", "evaluate"): EvaluateSpec,
    ("EvaluateSpec", "sampling"): SamplingSpec,
    ("ModelSpec", "head"): DiffusionSpec,
    ("DataSpec", "world"): WorldSpec,
}


def from_dict(cls: type[T], content: dict[str, Any], where: str) -> T:
    """Builds a spec from plain data; an unknown, missing or ill-typed key raises InvalidInput naming `where`."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise InvalidInput(unknown_key(key, known, where))
        nested = _NESTED.get((cls.__name__, key))
        if nested is not None and value is not None:
            value = from_dict(nested, value, f"{where}: {key}")
        values[key] = _coerce(value, str(known[key].type), f"{where}: {key}")
    unset = dataclasses.MISSING
    missing = [n for n, f in known.items() if n not in values and f.default is unset and f.default_factory is unset]
    if missing:
        raise InvalidInput(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def unknown_key(key: str, known: Any, where: str) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    import difflib

    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"{where}: unknown key {key!r}; did you mean {near[0]!r}? known: {', '.join(sorted(known))}"


def _coerce(value: Any, annotation: str, where: str) -> Any:
    if annotation == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = {"float": float, "int": int, "str": str}.get(annotation)
    if wanted is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
        raise InvalidInput(f"{where}: expected {annotation}, got {value!r}")
    if annotation.startswith("tuple"):
        if not isinstance(value, (list, tuple)):
            raise InvalidInput(f"{where}: expected a list, got {value!r}")
        return tuple(value)
    return value


def run_spec_from_json(text: str, where: str) -> RunSpec:
    """Reads what `to_json` wrote. Raises InvalidInput when it is not a run spec."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{where}: not JSON ({error})") from error
    return from_dict(RunSpec, content, where)


__all__ = [
    "ARMS",
    "MASK_LAWS",
    "ORDERS",
    "SOLVERS",
    "TOKEN_KINDS",
    "DataSpec",
    "DiffusionSpec",
    "EvaluateSpec",
    "InvalidInput",
    "ModelSpec",
    "RunSpec",
    "SamplingSpec",
    "TrainSpec",
    "WorldSpec",
    "canonical",
    "digest",
    "from_dict",
    "run_spec_from_json",
    "to_json",
    "unknown_key",
]
