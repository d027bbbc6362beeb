"""What a run will cost, before anything is spent: seconds, memory, disk. Estimates, good to a factor of two.

Arithmetic comes from the closed-form FLOPs; what a device makes of it from the profile (resources.yaml).
"""

from __future__ import annotations

from dataclasses import dataclass

from fluidscale import flops
from fluidscale.published import GENEVAL_PROMPTS, JUDGES
from fluidscale.spec import RunSpec
from slurm.placement import Profile

# float32 weights, gradients, the average and each of Adam's two moments.
_WIDE = 4
# A checkpoint holds weights, moments and averaged weights; the one before it is kept until the next is safe.
_CHECKPOINT_BYTES, _CHECKPOINTS_KEPT = 4 * 4, 2
# Values kept for backward per token, channel and block: self-attention 6, cross-attention 4, MLP (4x) 10. Of a block
# that is computed again its input alone, in float32.
_BLOCK_VALUES, _INPUT_VALUES = 20, 2
# The same in one residual block of the denoising head (AdaLN rows, normed input, hidden layer twice, output). Of one
# that is computed again its AdaLN rows and its input.
_HEAD_VALUES, _HEAD_INPUT_VALUES = 9, 4
# A Python process with torch, Lightning and the evaluation networks.
_PROCESS_GB = 0.9
# What a published judge computes an image, FLOPs, by torch's FlopCounterMode (tests/test_sizing.py): Mask2Former Swin-S
# at 800 px without its colours, Inception-v3, DINOv2 and CLIP ViT-L/14 at 224 px.
_JUDGE_FLOPS = {"geneval": 4.4e11, "fid": 1.1e10, "fd": 1.6e11, "clip_score": 1.7e11}
# Passes over a validation image in fluidscale/evaluate: val_loss and val_nll, four views each where a view shows a part
# of the tokens; the two stepwise likelihoods, 16 steps each of at most 256 images.
_VIEWS = {"raster": 2, "random": 8}
_STEPWISE_VIEWS, _STEPWISE_IMAGES = 32, 256
# Images of one such pass, and what it costs of a training step beside its arithmetic: forward without backward.
_PASS_IMAGES, _PASS_SHARE = 64, 1 / 3
# A block of the denoising head as a share of one of the trunk, beside its arithmetic; fitted to the steps of
# results/local/runs.csv (`python benchmarks/prices.py`).
_HEAD_BLOCK = 1 / 8
# What TF32 and float32 take of a GPU's time, as multiples of bf16's: NVIDIA's data sheets of A100 (312, 156 and 19.5
# TFLOP/s, dense) and H100 SXM (989, 495 and 67).
_SLOWER = (2.0, 15.0)
# A PNG costs about this many bytes a pixel of an icon scene.
_PNG_BYTES = 1.2


@dataclass(frozen=True)
class Memory:
    """What one device holds while it trains, GB (1e9 bytes); sharded, the first four are its part alone."""

    weights: float  # with the copies that a step computes on: half precision, or gathered from all devices
    gradients: float
    optimizer: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        return _PROCESS_GB + self.weights + self.gradients + self.optimizer + self.average + self.activations


@dataclass(frozen=True)
class Cost:
    """The price of one run on its devices, and what it leaves on disk."""

    train_seconds: float  # of the steps that this run really makes: what its siblings made before is not paid again
    evaluate_seconds: float
    other_seconds: float
    devices: int  # that train
    evaluating_devices: int
    tokens_per_s: float  # assumed, all devices together
    memory: Memory
    disk_gb: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.evaluate_seconds + self.other_seconds

    @property
    def device_seconds(self) -> float:
        """Of all devices together."""
        training = (self.train_seconds + self.other_seconds) * self.devices
        return training + self.evaluate_seconds * self.evaluating_devices

    @property
    def memory_gb(self) -> float:
        return self.memory.total


def cost(spec: RunSpec, first_step: int, profile: Profile) -> Cost:
    """The price of `spec` when its trunk's checkpoint at `first_step` is there already.

    What devices lose by waiting for each other is part of `sustained_tflops`.
    """
    rate = profile.sustained_tflops * 1e12
    per_image = flops.flops_per_image(spec.model)
    steps = spec.train.steps - first_step
    # Backward costs twice the forward; computing activations again is another forward.
    arithmetic = (4 if profile.recompute else 3) * per_image["total"] * spec.train.batch / profile.processes / rate
    parts = spec.train.batch / profile.processes / samples_at_once(spec, profile)
    step_seconds = arithmetic + parts * _blocks(spec) * profile.layer_seconds
    evaluating = profile.evaluating or profile
    return Cost(
        train_seconds=steps * step_seconds,
        evaluate_seconds=_evaluate_seconds(spec, profile, evaluating.processes),
        other_seconds=profile.run_seconds,
        devices=profile.processes,
        evaluating_devices=evaluating.processes,
        tokens_per_s=spec.train.batch * spec.model.num_tokens / step_seconds,
        memory=memory(spec, profile),
        disk_gb=disk_gb(spec),
    )


def _blocks(spec: RunSpec) -> float:
    """What a pass through the model costs beside its arithmetic, in blocks of the trunk."""
    head = spec.model.head
    return spec.model.depth + (_HEAD_BLOCK * head.num_blocks if head else 0)


def samples_at_once(spec: RunSpec, profile: Profile) -> float:
    """Samples whose activations one device holds."""
    return profile.micro_batch or spec.train.batch / profile.processes


def _evaluate_seconds(spec: RunSpec, profile: Profile, processes: int) -> float:
    """Images are shared out, drawn in TF32, judged in float32; every process makes all validation passes in float32."""
    tf32, float32 = _SLOWER if "16" in profile.precision else (1.0, 1.0)
    shared = tf32 * _drawn_flops(spec) + float32 * _judged_flops(spec)
    passes = _passes(spec) / _PASS_IMAGES * _PASS_SHARE * _blocks(spec) * profile.layer_seconds
    return (shared / processes + float32 * _passes_flops(spec)) / (profile.sustained_tflops * 1e12) + passes


def evaluation_flops(spec: RunSpec) -> float:
    """FLOPs of measuring a run once: every image drawn and judged, and all passes over the validation images."""
    return _drawn_flops(spec) + _judged_flops(spec) + _passes_flops(spec)


def _images(spec: RunSpec) -> dict[str, int]:
    """How many images each count of `evaluate` draws. An embedded world poses about as many prompts as GenEval."""
    evaluate = spec.evaluate
    geneval = evaluate.geneval_images_per_prompt * GENEVAL_PROMPTS
    return {"fd_images": evaluate.fd_images, "geneval_images_per_prompt": geneval}


def _drawn_flops(spec: RunSpec) -> float:
    return sum(_images(spec).values()) * flops.sampling_flops(spec.model, spec.evaluate.sampling)


def _judged_flops(spec: RunSpec) -> float:
    images = _images(spec)
    return sum(images[JUDGES[judge][0]] * _JUDGE_FLOPS[judge] for judge in spec.evaluate.judges)


def _passes(spec: RunSpec) -> int:
    """Validation images that go through the model, each as often as it does."""
    evaluate = spec.evaluate
    passes = _VIEWS[spec.model.order] * evaluate.val_images
    if spec.model.order == "random":
        passes += _STEPWISE_VIEWS * min(evaluate.val_images, evaluate.stepwise_images, _STEPWISE_IMAGES)
    return passes


def _passes_flops(spec: RunSpec) -> float:
    return _passes(spec) * flops.flops_per_image(spec.model)["total"]


def memory(spec: RunSpec, profile: Profile) -> Memory:
    """Peak memory of one device in training."""
    half = "16" in profile.precision
    narrow = 2 if half else _WIDE
    counts = flops.params(spec.model)
    total, shards = counts["total"], profile.processes if profile.strategy == "fsdp" else 1
    if profile.strategy == "fsdp":
        # Gathered at a time: two units, of which one is on its way, and all that belongs to no block.
        unit = max(counts["body"] / spec.model.depth, counts["head"])
        copies = narrow * (2 * unit + counts["embed"])
    else:
        copies = narrow * total if half else 0
    state = _WIDE * total / shards / 1e9
    kept = samples_at_once(spec, profile) * _activations(spec, profile.recompute) * narrow / 1e9
    return Memory(state + copies / 1e9, state, 2 * state, state, kept)


def _activations(spec: RunSpec, recompute: bool) -> float:
    """Values that one sample keeps for the backward pass."""
    model = spec.model
    blocks = ((model.num_tokens, model.depth), (model.text_length, model.aligner_depth))
    values = 0.0
    for length, depth in blocks:
        # One block at a time is computed again.
        per_token = depth * _INPUT_VALUES + min(depth, 1) * _BLOCK_VALUES if recompute else depth * _BLOCK_VALUES
        values += length * model.width * per_token
    if model.head is None:
        return values + 2 * model.num_tokens * model.vocab_size
    rows, count = model.num_tokens * model.head.noise_repeats, model.head.num_blocks
    per_row = count * _HEAD_INPUT_VALUES + _HEAD_VALUES if recompute else count * _HEAD_VALUES
    return values + rows * model.head.width * per_row


def disk_gb(spec: RunSpec) -> float:
    """What a run leaves on disk, GB: two checkpoints, its branch point, the final weights and its pictures."""
    weights = flops.params(spec.model)["total"]
    pixels = (spec.data.world.resolution if spec.data.world else 256) ** 2
    pictures = sum(_images(spec).values())
    checkpoints = weights * _CHECKPOINT_BYTES * (_CHECKPOINTS_KEPT + 1)
    return (checkpoints + weights * 4 + pictures * pixels * _PNG_BYTES) / 1e9
