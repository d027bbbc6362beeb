import dataclasses

import pytest
import torch
from tiny_models import ARMS, arm_spec, awake, sampling_of, text_of

from fluidscale.model.generator import SCHEDULES, generate, tensor_cores
from fluidscale.model.transformer import Text
from fluidscale.spec import GUIDANCE_SCHEDULES, InvalidInput

LATENT_TOLERANCE = 1e-4


def one(text, i):
    return Text(text.values[i : i + 1], text.mask[i : i + 1])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_of_eight_is_eight_batches_of_one(arm, guidance):
    model = awake(arm_spec(arm))
    text, seeds = text_of(model.spec, 8), [11, 5, 7, 2**40, 1, 99, 3, 8]
    sampling = sampling_of(model.spec, guidance=guidance)
    together = generate(model, text, sampling, seeds)
    alone = torch.cat([generate(model, one(text, i), sampling, [seed]) for i, seed in enumerate(seeds)])
    if model.spec.token_kind == "discrete":
        assert torch.equal(together, alone)
    else:
        assert torch.allclose(together, alone, atol=LATENT_TOLERANCE)
    other = generate(model, text, sampling, [seed + 1 for seed in seeds])
    assert not torch.equal(together, other)


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_every_objective_makes_the_same_draws_alone(objective):
    model = awake(arm_spec("continuous-random", objective=objective))
    text, sampling = text_of(model.spec, 3), sampling_of(model.spec)
    together = generate(model, text, sampling, [1, 2, 3])
    assert torch.allclose(together[1:2], generate(model, one(text, 1), sampling, [2]), atol=LATENT_TOLERANCE)


@pytest.mark.parametrize("arm", ["discrete-random", "continuous-raster"])
def test_guidance_one_is_no_guidance_and_runs_half_the_batch(arm):
    model = awake(arm_spec(arm))
    batches = []
    model.trunk.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    text = text_of(model.spec, 3)
    plain = generate(model, text, sampling_of(model.spec, guidance=1.0), [1, 2, 3])
    assert set(batches) == {3}
    batches.clear()
    nearly = generate(model, text, sampling_of(model.spec, guidance=1 + 1e-6), [1, 2, 3])
    assert set(batches) == {6}
    assert torch.allclose(plain.float(), nearly.float(), atol=1e-3)
    assert not torch.equal(plain, generate(model, text, sampling_of(model.spec, guidance=4.0), [1, 2, 3]))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_scales_share_a_batch(arm, schedule):
    model = awake(arm_spec(arm))
    text, seeds, scales = text_of(model.spec, 6), [3, 1, 4, 1, 5, 9], [1.0, 2.0, 4.0, 2.0, 1.0, 6.5]
    together = generate(model, text, sampling_of(model.spec, schedule=schedule), seeds, scales=scales)
    for scale in set(scales):
        mine = [k for k, own in enumerate(scales) if own == scale]
        part = Text(text.values[mine], text.mask[mine])
        sampling = sampling_of(model.spec, guidance=scale, schedule=schedule)
        alone = generate(model, part, sampling, [seeds[k] for k in mine])
        torch.testing.assert_close(together[mine], alone, atol=LATENT_TOLERANCE, rtol=0)


def test_guidance_schedules_are_mars():
    assert tuple(SCHEDULES) == GUIDANCE_SCHEDULES
    assert SCHEDULES["constant"](3.0, 256, 100) == 3.0
    assert SCHEDULES["linear"](3.0, 256, 255) == pytest.approx(1 + 2 / 256)
    # MAR counts one token as masked after its last step.
    assert SCHEDULES["linear"](3.0, 256, 0) == pytest.approx(1 + 2 * 255 / 256)


@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_progress_counts_the_autoregressive_steps(num_steps):
    seen = []
    random, raster = (awake(arm_spec(f"discrete-{order}")) for order in ("random", "raster"))
    for model, steps in ((random, num_steps), (raster, 9)):
        seen.clear()
        generate(model, text_of(model.spec, 1), sampling_of(model.spec, num_steps), [0], lambda *at: seen.append(at))
        assert seen == [(k + 1, steps) for k in range(steps)]


def test_linear_guidance_ends_at_full_scale_and_differs_from_constant():
    model = awake(arm_spec("continuous-random"))
    text = text_of(model.spec, 2)
    constant, linear = (
        generate(model, text, sampling_of(model.spec, guidance=3.0, schedule=schedule), [1, 2])
        for schedule in SCHEDULES
    )
    assert not torch.allclose(constant, linear, atol=1e-2)


@pytest.mark.parametrize(("change", "seeds"), [({"guidance_schedule": "cubic"}, [1, 2]), ({}, [1]),
                                               ({"num_inference_steps": 10}, [1, 2])])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(change, seeds):
    model = awake(arm_spec("discrete-random"))
    with pytest.raises(InvalidInput):
        generate(model, text_of(model.spec, 2), dataclasses.replace(sampling_of(model.spec), **change), seeds)


@pytest.mark.parametrize("arm", ["continuous-random", "continuous-raster"])
def test_fewer_denoising_steps_are_taken_as_more_is_known(arm):
    model = awake(arm_spec(arm))
    text, sampling = text_of(model.spec, 2), dataclasses.replace(sampling_of(model.spec), num_denoising_steps=10)
    rows: list[int] = []
    model.head.denoiser.input.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    same = dataclasses.replace(sampling, final_denoising_steps=10)
    assert torch.equal(generate(model, text, sampling, [1, 2]), generate(model, text, same, [1, 2]))
    counts = {}
    for final in (10, 2):
        rows.clear()
        drawn = generate(model, text, dataclasses.replace(sampling, final_denoising_steps=final), [1, 2])
        counts[final] = len(rows)
        assert drawn.isfinite().all()
    steps = len(model.order.steps(9, 4, torch.arange(9).expand(2, -1)))
    assert counts[10] == 10 * steps and 0.5 < counts[2] / counts[10] < 0.85
    with pytest.raises(InvalidInput, match="final_denoising_steps"):
        generate(model, text, dataclasses.replace(sampling, final_denoising_steps=-1), [1, 2])


def test_a_gpu_draws_in_tf32_and_measures_in_float32():
    assert torch.get_float32_matmul_precision() == "highest"
    for device, precision in (("cuda", "high"), ("cpu", "highest")):
        with pytest.raises(KeyError), tensor_cores(torch.device(device)):
            assert torch.get_float32_matmul_precision() == precision
            raise KeyError
        assert torch.get_float32_matmul_precision() == "highest"
