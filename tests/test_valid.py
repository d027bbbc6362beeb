"""Numbers that must fit together, and what is read of a run's spec.json."""

import json

import pytest

from fluidscale.limits import InvalidInput
from fluidscale.spec import to_json
from fluidscale.valid import read_run_spec, run_spec_from_json


def changed(spec, key, value):
    """The spec's file with one dotted key changed."""
    content = json.loads(to_json(spec))
    *parents, leaf = key.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[leaf] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("arm", "key", "value", "message"),
    [
        ("discrete-random", "seed", -1, "seed: expected at least 0"),
        ("discrete-random", "seed", 2**32, "seed: .*below 4294967296"),
        ("discrete-random", "model", 3, "model: expected keys and values, got 3"),
        ("discrete-random", "model.token_kind", "wavelet", "model: token_kind: unknown 'wavelet'"),
        ("discrete-random", "model.order", "spiral", "model: order: unknown 'spiral'"),
        ("discrete-random", "model.depth", -1, "model: depth: expected at least 1"),
        ("discrete-random", "model.width", "wide", "model: width: expected a whole number"),
        ("discrete-random", "model.num_heads", 0, "model: num_heads: expected at least 1"),
        ("discrete-random", "model.num_heads", 3, "width 16 is not divisible by num_heads 3"),
        ("discrete-random", "model.grid", 0, "model: grid: expected at least 1"),
        ("discrete-random", "model.vocab_size", 1, "vocab_size of at least 2, got 1"),
        ("discrete-random", "model.aligner_depth", -1, "model: aligner_depth: expected at least 0"),
        ("discrete-random", "model.mlp_ratio", 0, "model: mlp_ratio: expected at least 1"),
        ("discrete-random", "model.text_init_std", -1, "model: text_init_std: expected at least 0"),
        ("discrete-random", "model.position", "everywhere", "model: position: unknown 'everywhere'"),
        ("discrete-random", "model.mask_law", "none", "mask_law 'none' is not for random order"),
        ("discrete-random", "model.encoder_depth", 2, "encoder_depth 2 leaves no block"),
        ("discrete-raster", "model.encoder_depth", 1, "encoder_depth and buffer_tokens are of random order"),
        ("discrete-raster", "model.buffer_tokens", -1, "model: buffer_tokens: expected at least 0"),
        ("continuous-random", "model.token_channels", 0, "token_channels of at least 1"),
        ("continuous-random", "model.head", None, "continuous tokens need one"),
        ("continuous-random", "model.head.num_blocks", 0, "model: head: num_blocks: expected at least 1"),
        ("continuous-random", "model.head.noise_repeats", 0, "model: head: noise_repeats: expected at least 1"),
        (
            "continuous-random",
            "model.head.objective",
            "x",
            "objective: unknown 'x'; .*known: eps, v, flow",
        ),
        ("discrete-random", "data.images_unique", 0, "data: images_unique: expected at least 1"),
        ("discrete-random", "data.images_unique", 7, "data.images_unique 7 is below one batch of 8"),
        ("discrete-random", "data.world.max_objects", 5, "data: world: max_objects: .*at most 4"),
        ("discrete-random", "data.world.position_step", 0, "data: world: position_step: expected at least 1"),
        ("discrete-random", "data.world.icon_sizes", [22], "icon_sizes must name 3 sizes"),
        ("discrete-random", "data.world.icon_sizes", [22, 20, 14], "2 icons of 20 px .* do not fit in 32 px; lower"),
        ("discrete-random", "data.world.rotation_degrees", 45, "2 icons of 23 px"),
        ("discrete-random", "data.world.classes", ["cat", "aple"], "classes.1.: unknown 'aple'; did you mean 'apple'"),
        ("discrete-random", "data.world.colors", ["red"], "colors must be at least two"),
        ("discrete-random", "train.lr", 0, "train: lr: expected above 0"),
        ("discrete-random", "train.lr_vectors", 0, "train: lr_vectors: expected above 0"),
        ("discrete-random", "train.batch", 0, "train: batch: expected at least 1"),
        ("discrete-random", "train.steps", 0, "train: steps: expected at least 1"),
        ("discrete-random", "train.decay_steps", -1, "train: decay_steps: expected at least 0"),
        ("discrete-random", "train.warmup_steps", -5, "train: warmup_steps: expected at least 0"),
        ("discrete-random", "train.warmup_steps", 20, "24 steps cannot hold 20 of warm-up"),
        ("discrete-random", "train.weight_decay", -1, "train: weight_decay: expected at least 0"),
        ("discrete-random", "train.beta1", 1.5, "train: beta1: .*below 1"),
        ("discrete-random", "train.beta2", 1, "train: beta2: .*below 1"),
        ("discrete-random", "train.grad_clip", 0, "train: grad_clip: expected above 0"),
        ("discrete-random", "train.ema_decay", 2, "train: ema_decay: .*below 1"),
        ("discrete-random", "train.text_drop", 5, "train: text_drop: .*at most 1"),
        ("discrete-random", "train.decay_shape", "step", "train: decay_shape: unknown 'step'; .*known: linear, cosine"),
        ("discrete-random", "train.decay_head", "no", "train: decay_head: expected true or false"),
        ("discrete-random", "evaluate.val_images", -1, "evaluate: val_images: expected at least 0"),
        ("discrete-random", "evaluate.fd_images", -5, "evaluate: fd_images: expected at least 0"),
        ("discrete-random", "evaluate.fd_images", 3, "evaluate.fd_images is 3: a distance needs at least 4"),
        ("discrete-raster", "evaluate.val_images", 1, "evaluate.val_images is 1: one image tells no standard error"),
        ("discrete-random", "evaluate.stepwise_images", 1, "stepwise_images is 1: one image tells no standard error"),
        ("discrete-random", "evaluate.stepwise_images", -1, "evaluate: stepwise_images: expected at least 0"),
        ("discrete-random", "evaluate.geneval_images_per_prompt", -1, "geneval_images_per_prompt: expected at least 0"),
        ("discrete-random", "evaluate.geneval_unseen", "no", "evaluate: geneval_unseen: expected true or false"),
        ("discrete-random", "evaluate.sampling.temperature", -1, "sampling: temperature: expected at least 0"),
        ("discrete-random", "evaluate.sampling.guidance_scale", -1, "sampling: guidance_scale: expected at least 0"),
        ("discrete-random", "evaluate.sampling.guidance_schedule", "lineer", "did you mean 'linear'"),
        ("discrete-random", "evaluate.sampling.num_inference_steps", 0, "num_inference_steps: expected at least 1"),
        ("discrete-random", "evaluate.sampling.num_inference_steps", 17, "num_inference_steps must be 1 to 16"),
        ("discrete-random", "evaluate.sampling.solver", "euler", "solver 'euler' does not draw codes"),
        ("discrete-raster", "evaluate.sampling.final_denoising_steps", 2, "final_denoising_steps is 2: codes"),
        ("continuous-raster", "evaluate.sampling.solver", "ddpm", "solver 'ddpm' .*choose from dpmpp_2m, euler"),
        ("continuous-raster", "evaluate.sampling.num_denoising_steps", 0, "num_denoising_steps must be at least 1"),
        (
            "continuous-raster",
            "evaluate.sampling.final_denoising_steps",
            -1,
            "final_denoising_steps: expected",
        ),
    ],
)
def test_a_number_that_cannot_be_run_is_refused_where_it_stands(tiny_spec, arm, key, value, message):
    with pytest.raises(InvalidInput, match=f"spec.json: .*{message}") as caught:
        run_spec_from_json(changed(tiny_spec(arm), key, value), "spec.json")
    assert "\n" not in str(caught.value)


def test_raster_order_takes_a_step_a_token_whatever_is_asked(tiny_spec):
    text = changed(tiny_spec("discrete-raster"), "evaluate.sampling.num_inference_steps", 17)
    assert run_spec_from_json(text, "spec.json").evaluate.sampling.num_inference_steps == 17


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b'{"model": 3}', None])
def test_a_file_that_is_no_spec_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "spec.json"
    path.mkdir() if content is None else path.write_bytes(content)
    for there in (path, tmp_path / "nowhere.json"):
        with pytest.raises(InvalidInput, match=there.name) as caught:
            read_run_spec(there)
        assert "\n" not in str(caught.value)
