"""What a run will cost, before anything is spent: seconds, memory, disk. Estimates, good to a factor of two.

Arithmetic comes from the closed-form FLOPs; what a device makes of it from the profile (resources.yaml).
"""

from __future__ import annotations

from dataclasses import dataclass

from fluidscale import flops
from fluidscale.spec import RunSpec
from slurm.placement import Profile

# Weights, gradients, two moments of Adam and the averaged weights, float32 each.
_STATE_BYTES = 5 * 4
# A checkpoint holds weights, moments and averaged weights; the one before it is kept until the next is safe.
_CHECKPOINT_BYTES, _CHECKPOINTS_KEPT = 4 * 4, 2
# Values kept for backward per token, channel and block: self-attention 6, cross-attention 4, MLP (4x) 10.
_BLOCK_VALUES = 20
# The same in one residual block of the denoising head (AdaLN rows, normed input, hidden layer twice, output).
_HEAD_VALUES = 9
# A Python process with torch, Lightning and the evaluation networks.
_PROCESS_GB = 0.9
# GenEval's prompts (djghosh13/geneval); the embedded world poses about as many, seen and unseen combinations together.
_PROMPTS = 553
# A PNG costs about this many bytes a pixel of an icon scene.
_PNG_BYTES = 1.2


@dataclass(frozen=True)
class Cost:
    """The price of one run on one worker, and what it leaves on disk."""

    train_seconds: float  # of the steps that this run really makes: what its siblings made before is not paid again
    evaluate_seconds: float
    other_seconds: float
    memory_gb: float
    disk_gb: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.evaluate_seconds + self.other_seconds


def cost(spec: RunSpec, first_step: int, profile: Profile) -> Cost:
    """The price of `spec` when its trunk's checkpoint at `first_step` is there already."""
    rate = profile.sustained_tflops * 1e12
    per_image = flops.flops_per_image(spec.model)
    steps = spec.train.steps - first_step
    # Backward costs twice the forward.
    arithmetic = 3 * per_image["total"] * spec.train.batch / rate
    latency = spec.model.depth * profile.layer_seconds
    return Cost(
        train_seconds=steps * (arithmetic + latency),
        evaluate_seconds=_evaluation_flops(spec, per_image) / rate,
        other_seconds=profile.run_seconds,
        memory_gb=memory_gb(spec, profile),
        disk_gb=disk_gb(spec),
    )


def _evaluation_flops(spec: RunSpec, per_image: dict[str, float]) -> float:
    evaluate, model = spec.evaluate, spec.model
    sampling = evaluate.sampling
    branches = 1 if sampling.guidance_scale == 1 else 2
    # Raster order with its cache reads each token once; random order reads all of them in every step.
    passes = 1 if model.order == "raster" else sampling.num_inference_steps
    head = per_image["head"]
    if model.head is not None:
        head *= sampling.num_denoising_steps / model.head.noise_repeats
    drawn = evaluate.fd_images + evaluate.geneval_images_per_prompt * _PROMPTS
    body = per_image["total"] - per_image["head"]
    return branches * drawn * (passes * body + head) + evaluate.val_images * per_image["total"]


def memory_gb(spec: RunSpec, profile: Profile) -> float:
    """Peak memory of training one batch on one device, GB (1e9 bytes)."""
    model, batch = spec.model, spec.train.batch
    wide = 2 if "16" in profile.precision else 4
    values = model.num_tokens * model.width * model.depth * _BLOCK_VALUES
    values += spec.model.text_length * model.width * model.aligner_depth * _BLOCK_VALUES
    if model.head is not None:
        rows = model.num_tokens * model.head.noise_repeats
        values += rows * model.head.width * model.head.num_blocks * _HEAD_VALUES
    else:
        values += 2 * model.num_tokens * model.vocab_size
    state = flops.params(model)["total"] * _STATE_BYTES
    return _PROCESS_GB + (state + batch * values * wide) / 1e9


def disk_gb(spec: RunSpec) -> float:
    """What a run leaves on disk, GB: two checkpoints, its branch point, the final weights and its pictures."""
    weights = flops.params(spec.model)["total"]
    pixels = (spec.data.world.resolution if spec.data.world else 256) ** 2
    pictures = spec.evaluate.fd_images + spec.evaluate.geneval_images_per_prompt * _PROMPTS
    checkpoints = weights * _CHECKPOINT_BYTES * (_CHECKPOINTS_KEPT + 1)
    return (checkpoints + weights * 4 + pictures * pixels * _PNG_BYTES) / 1e9
