"""A trained run as a pipeline and as a folder: the same pictures, bit for bit."""

import json

import numpy as np
import pytest
import torch

from fluidscale import export, sample
from fluidscale.pipeline import FluidPipeline
from fluidscale.record import Placement
from fluidscale.run import run
from fluidscale.spec import InvalidInput

PROMPTS = ["a photo of a red apple", "a photo of a blue car"]


@pytest.fixture(scope="module", params=["continuous-random", "discrete-raster"])
def trained(request, tmp_path_factory, tiny_spec):
    spec = tiny_spec(request.param, steps=6, decay_steps=1)
    run_dir = tmp_path_factory.mktemp("runs") / spec.id
    run(spec, run_dir, Placement(device="cpu"))
    return run_dir


def test_an_exported_folder_draws_the_same_pictures_bit_for_bit(trained, tmp_path, capsys):
    assert export.main([str(trained), "--out", str(tmp_path / "folder")]) == 0
    here, there = FluidPipeline.from_run(trained, "cpu"), FluidPipeline.from_pretrained(tmp_path / "folder", "cpu")
    for name, tensor in here.model.state_dict().items():
        assert torch.equal(there.model.state_dict()[name], tensor), name
    drawn = [p(PROMPTS, generator=torch.Generator().manual_seed(3), output_type="np").images for p in (here, there)]
    assert np.array_equal(*drawn) and drawn[0].dtype == np.float32 and drawn[0].shape == (2, 32, 32, 3)
    there.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "folder").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "folder")).read_bytes()
    assert export.main([str(trained), "--out", str(tmp_path / "folder")]) == 2
    assert "name an empty or a new folder" in capsys.readouterr().err


def test_the_card_is_made_of_the_record(trained, tmp_path):
    FluidPipeline.from_run(trained, "cpu").save_pretrained(tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    record = json.loads((trained / "record.json").read_text())
    for said in (record["run_id"], record["tokenizer_sha"], f"{record['val_loss']:.5g}", record["val_loss_protocol"]):
        assert said in card
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "FluidPipeline"


def test_images_come_prompt_by_prompt_and_depend_on_their_own_seed(trained):
    pipe = FluidPipeline.from_run(trained, "cpu")
    four = pipe(PROMPTS, num_images_per_prompt=2, generator=[1, 2, 3, 4], output_type="latent").images
    alone = pipe(PROMPTS[1], generator=[3], output_type="latent").images
    assert torch.allclose(four[2:3].float(), alone.float(), atol=1e-4)
    seen: list[tuple[int, int]] = []
    drawn = pipe(PROMPTS[0], 2, 1.0, 3, progress=lambda *at: seen.append(at)).images
    assert [image.size for image in drawn] == [(32, 32)] * 3 and seen[-1] == (3, 3)
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    assert len(pipe(PROMPTS, generator=generators).images) == 2


def test_the_command_line_draws_from_either_folder(trained, tmp_path):
    FluidPipeline.from_run(trained, "cpu").save_pretrained(tmp_path / "folder")
    for folder in (trained, tmp_path / "folder"):
        out = str(tmp_path / f"{folder.name}.png")
        assert sample.main([str(folder), PROMPTS[0], "--num-images", "2", "--seed", "5", "--out", out]) == 0
    assert (tmp_path / f"{trained.name}.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


def test_what_cannot_be_drawn_or_loaded_is_refused_in_one_line(trained, tmp_path, capsys):
    pipe = FluidPipeline.from_run(trained, "cpu")
    for change, words in (
        ({"output_type": "jpeg"}, "known: pil, np, latent"),
        ({"num_images_per_prompt": 0}, "nothing to draw"),
        ({"generator": [1, 2]}, "2 generators for 1 images"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
    ):
        if pipe.spec.model.order == "raster" and "num_inference_steps" in change:
            continue  # raster order takes one step a token, whatever is asked
        with pytest.raises(InvalidInput, match=words):
            pipe(PROMPTS[0], **change)
    folder = tmp_path / "folder"
    pipe.save_pretrained(folder)
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert sample.main([str(folder), PROMPTS[0], "--out", str(tmp_path / "none.png")]) == 2
    weights.unlink()
    assert sample.main([str(folder), PROMPTS[0], "--out", str(tmp_path / "none.png")]) == 2
    assert sample.main([str(tmp_path / "nowhere"), PROMPTS[0], "--out", str(tmp_path / "none.png")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "export the run again" in lines[0] and not (tmp_path / "none.png").exists()
