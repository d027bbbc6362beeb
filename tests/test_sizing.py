"""The paper's sweep, planned on GPUs that this machine does not have."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from fluidscale.flops import params, sampling_flops
from fluidscale.published import GENEVAL_PROMPTS, JUDGES
from fluidscale.sweep import load_sweep
from fluidscale.world.prompts import PROTOCOL
from slurm import cost, launch, placement, plan, sizing
from slurm.placement import choose, load_profile

# arXiv 2410.13863, Table 1.
REPORTED = {"166M": 166e6, "369M": 369e6, "665M": 665e6, "1.1B": 1.1e9, "3.1B": 3.1e9, "10.5B": 10.5e9}
# Guidance and temperature, ibid.
SAMPLING = {"continuous-random": (5.0, 0.975), "continuous-raster": (4.5, 0.975),
            "discrete-random": (1.6, 1.05), "discrete-raster": (2.5, 0.95)}  # fmt: skip


@pytest.fixture(scope="module")
def fluid():
    return load_sweep("fluid")


def printed(table) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_sweep_is_four_arms_of_five_sizes_and_the_largest_of_one(fluid):
    assert len(fluid.runs) == 21
    assert [run.arm for run in fluid.runs if run.size == "10.5B"] == ["continuous-random"]
    for run in fluid.runs:
        assert params(run.model)["total"] == pytest.approx(REPORTED[run.size], rel=0.04)
        sampling = run.evaluate.sampling
        assert (sampling.guidance_scale, sampling.temperature) == SAMPLING[run.arm]
        assert sampling.num_inference_steps == (64 if run.model.order == "random" else 256)
        assert run.images == 2_048_000_000 and run.model.text_width == 4096 and run.model.text_length == 128
        if run.model.head:
            assert (run.model.head.objective, run.model.head.width) == ("eps", run.model.width)
            assert (sampling.solver, sampling.num_denoising_steps) == ("ddpm", 100)


def test_a_sweep_too_large_for_this_machine_is_priced_on_others(fluid, monkeypatch, capsys):
    monkeypatch.setattr(placement, "cuda_devices", list)
    monkeypatch.setenv("COLUMNS", "220")
    assert launch.main(["plan", "fluid"]) == 0
    said = capsys.readouterr().out
    for words in ("a100: 80 GB", "h100: 80 GB", "30% of them reached", "positions in every layer", "on others:"):
        assert words in said
    assert launch.main(["plan", "fluid", "--json"]) == 0
    rows = {(row["token_kind"], row["order"], row["size"]): row for row in json.loads(capsys.readouterr().out)["runs"]}
    largest = rows["continuous", "random", "10.5B"]
    assert largest["gpus"] == 128 and largest["memory_gb_per_gpu"] < 80
    # 30 % of 989 TFLOP/s, training alone.
    ideal = largest["train_flops"] / (0.3 * 989e12) / 3600
    assert ideal < largest["gpu_hours"] < 1.4 * ideal


def test_a_plan_that_does_not_fit_is_refused_with_the_smallest_that_does(tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text("h100: {sizes: {10.5B: {strategy: ddp, devices: 8}}}\n")
    asked = ["plan", "fluid", "--size", "10.5B", "--cluster", "slurm", "--profile", "h100", "--resources", str(own)]
    assert launch.main(asked) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "the smallest placement that fits is {strategy: fsdp, devices: " in line
    spec, profile = load_sweep("fluid", ["10.5B"]).runs[0], load_profile("h100")
    tiny = dataclasses.replace(profile, memory_gb=1.0)
    assert "no placement of up to" in plan.smallest(spec, tiny)


def test_nothing_is_submitted_before_the_data_are_named(tmp_path, capsys):
    there = ["--cluster", "slurm", "--profile", "h100", "--runs", str(tmp_path / "r")]
    assert launch.main(["submit", "fluid", "--size", "166M", *there]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "data.shards" in line and not (tmp_path / "r").exists()


def test_sharding_divides_what_a_device_holds(fluid):
    spec, profile = fluid.runs[0], dataclasses.replace(load_profile("h100"), strategy="ddp", devices=8)
    whole, parts = (cost.memory(spec, dataclasses.replace(profile, strategy=s)) for s in ("ddp", "fsdp"))
    total = params(spec.model)["total"]
    assert whole.optimizer == pytest.approx(8 * total / 1e9) == pytest.approx(8 * parts.optimizer)
    assert (whole.gradients, whole.average) == pytest.approx((8 * parts.gradients, 8 * parts.average))
    again = cost.memory(spec, dataclasses.replace(profile, recompute=True))
    assert again.activations < 0.4 * whole.activations and again.optimizer == whole.optimizer
    halves = cost.memory(spec, dataclasses.replace(profile, micro_batch=128))
    assert halves.activations == pytest.approx(whole.activations / 2)


def test_tables_have_a_row_a_run_and_a_row_a_head(fluid):
    priced = plan.make_plan(fluid, choose("slurm", "h100"))
    said = printed(sizing.placements(priced))
    assert sum("ddp" in line or "fsdp" in line for line in said.splitlines()) == 21
    said = printed(sizing.alternatives((run.size, run.model) for run in fluid.runs))
    assert sum("%" in line for line in said.splitlines()) == 11


def test_evaluation_is_priced_like_training(fluid):
    """By what it draws and how often it looks at a validation image; nothing measured costs nothing."""
    run = fluid.runs[0]
    evaluation = dataclasses.replace(run.evaluate, val_images=100, geneval_images_per_prompt=4, fd_images=30_000)
    run = dataclasses.replace(run, evaluate=evaluation)
    twice = dataclasses.replace(evaluation, val_images=200, geneval_images_per_prompt=8, fd_images=60_000)
    nothing = dataclasses.replace(evaluation, val_images=0, geneval_images_per_prompt=0, fd_images=0)
    price, double, none = (
        cost.evaluation_flops(dataclasses.replace(run, evaluate=one)) for one in (evaluation, twice, nothing)
    )
    assert double == pytest.approx(2 * price) and none == 0
    drawn = (30_000 + 4 * 553) * sampling_flops(run.model, evaluation.sampling)
    assert drawn < price < 1.1 * drawn
    profile = load_profile("a100").of(run.size)
    row = plan.as_rows(plan.make_plan(dataclasses.replace(fluid, runs=(run,)), plan.Machine(profile, 1)))[0]
    assert row["evaluation_flops"] == price and 0 < row["evaluation_hours"] < row["hours"]


def test_images_are_drawn_and_judged_by_all_devices_that_evaluate(fluid):
    run = fluid.runs[0]
    evaluate = dataclasses.replace(run.evaluate, val_images=0)
    run = dataclasses.replace(run, evaluate=evaluate)
    judged = dataclasses.replace(run, evaluate=dataclasses.replace(evaluate, judges=tuple(JUDGES)))
    added = cost.evaluation_flops(judged) - cost.evaluation_flops(run)
    assert sum(PROTOCOL.values()) == GENEVAL_PROMPTS == 553
    assert added == pytest.approx(4 * 553 * 4.4e11 + 30_000 * (1.1e10 + 1.6e11 + 1.7e11))
    one = load_profile("h100")
    eight = dataclasses.replace(one, evaluation={"strategy": "ddp", "devices": 8})
    alone, together = (cost.cost(judged, 0, profile) for profile in (one, eight))
    assert alone.evaluate_seconds == pytest.approx(8 * together.evaluate_seconds)
    assert alone.evaluate_seconds * alone.evaluating_devices == pytest.approx(together.evaluate_seconds * 8)


def test_judges_cost_what_is_said_of_them():
    """Counted on the published configurations, without values."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    from fluidscale.evaluate.judges.inception import Inception

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    swin = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    vision = {**large, "intermediate_size": 4096, "image_size": 224}
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
        dinov2, inception = Dinov2Model(Dinov2Config(**large, image_size=518)), Inception().eval()
        seen, words = torch.zeros(1, 3, 224, 224), torch.zeros(1, 20, dtype=torch.long)
    # Its sampling of features needs a device that is one.
    with FakeTensorMode() as fake:
        detector = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_queries=100)).eval()

    def detect():
        with fake:
            detector(pixel_values=torch.zeros(1, 3, 800, 800))

    calls = {
        "geneval": detect,
        "fid": lambda: inception(seen),
        "fd": lambda: dinov2(pixel_values=seen),
        "clip_score": lambda: (clip.vision_model(pixel_values=seen), clip.text_model(input_ids=words)),
    }
    for name, call in calls.items():
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
        assert cost._JUDGE_FLOPS[name] == pytest.approx(counter.get_total_flops(), rel=0.05), name
