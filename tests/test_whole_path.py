"""What a lab does, by its commands, on saved networks in their real formats: from PNGs to an exported model.

PNGs and COCO captions -> AutoencoderKL or VQModel, and T5 -> shards -> two processes that train together -> evaluation
-> export -> the call that users of diffusers know.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from real_formats import saved_stack
from safetensors.torch import load_file

from fluidscale import export, sample
from fluidscale.evaluate.__main__ import main as evaluate
from fluidscale.folder import RunFolder
from fluidscale.pipeline import FluidPipeline
from fluidscale.run import main as train
from fluidscale.spec import InvalidInput, to_json
from fluidscale.sweep import load_sweep
from slurm.placement import load_profile, place

PROMPTS = ["a red cat", "two dog on the left of a house"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return saved_stack(tmp_path_factory.mktemp("stack"))


def trained_by_two(root, arm):
    """The folder of a run that two processes have trained and the first has evaluated, all by the command line."""
    sweep = load_sweep(str(root / "pictures.yaml"), arms=[arm])
    spec = sweep.runs[0]
    two = dataclasses.replace(place(spec, load_profile("cpu"), (), sweep.assets), strategy="ddp", devices=2)
    asked, where, folder = root / f"{arm}.json", root / f"{arm}-placement.json", root / "runs" / spec.id
    asked.write_text(to_json(spec))
    where.write_text(json.dumps(dataclasses.asdict(two)))
    assert train([str(asked), "--dir", str(folder), "--placement", str(where)]) == 0
    return folder


def drawn(pipe, output_type):
    """Four pictures as diffusers' users ask for them."""
    return pipe(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=3.0,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(5),
        output_type=output_type,
    ).images


@pytest.mark.parametrize(("arm", "tokenizer"), [("continuous-random", "vae"), ("discrete-raster", "vq")])
def test_from_pngs_to_an_exported_pipeline(stack, tmp_path, capsys, arm, tokenizer):
    root = shutil.copytree(stack, tmp_path / "stack")
    (root / "pictures.yaml").write_text((root / "pictures.yaml").read_text().replace(str(stack), str(root)))
    run_dir = trained_by_two(root, arm)
    record = RunFolder(run_dir).record
    assert record["status"] == "done" and record["images"] == 48 and record["val_loss_n"] == 4

    # Evaluated again from the weights alone, the scores are those of the run.
    shutil.rmtree(run_dir / "eval")
    capsys.readouterr()
    assert evaluate([str(run_dir), "--json"]) == 0
    scores = {score["name"]: score["value"] for score in json.loads(capsys.readouterr().out)}
    assert scores["val_loss"] == record["val_loss"] and scores["val_nll"] == record["val_nll"]

    before = FluidPipeline.from_run(run_dir, "cpu")
    wanted = {kind: drawn(before, kind) for kind in ("latent", "np")}
    exported = tmp_path / "exported"
    assert export.main([str(run_dir), "--out", str(exported)]) == 0
    weights = load_file(RunFolder(run_dir).weights)

    # Neither the run nor the data that it was trained on are needed to draw.
    shutil.rmtree(root / "runs"), shutil.rmtree(root / f"{tokenizer}-shards"), shutil.rmtree(root / "images")
    after = FluidPipeline.from_pretrained(exported, "cpu")
    loaded = after.model.state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert torch.equal(drawn(after, "latent"), wanted["latent"]) and np.array_equal(drawn(after, "np"), wanted["np"])
    pictures = drawn(after, "pil")
    assert [picture.size for picture in pictures] == [(32, 32)] * 4 and np.asarray(pictures[0]).std() > 1
    card = (exported / "README.md").read_text()
    assert f"{record['val_loss']:.5g}" in card and record["tokenizer_sha"] in card and "t5-12" in card

    # A second round trip writes the same bytes; moved networks are named by hash.
    after.save_pretrained(tmp_path / "again")
    files = [path.relative_to(exported) for path in exported.rglob("*") if path.is_file()]
    assert files and all((exported / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    root.rename(tmp_path / "moved")
    with pytest.raises(InvalidInput):
        FluidPipeline.from_pretrained(exported, "cpu")
    spec = after.spec
    moved = {spec.tokenizer_sha256: tokenizer, spec.text_encoder_sha256: "t5"}
    assets = {sha256: str(tmp_path / "moved" / name) for sha256, name in moved.items()}
    again = FluidPipeline.from_pretrained(exported, "cpu", assets)
    assert torch.equal(drawn(again, "latent"), wanted["latent"])
    capsys.readouterr()
    assert sample.main([str(exported), PROMPTS[0], "--out", str(tmp_path / "grid.png")]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and not (tmp_path / "grid.png").exists()
