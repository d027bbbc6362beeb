"""The whole path on real formats: PNGs and COCO captions, saved networks, shards, training, evaluation, pictures."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from real_formats import encoding, saved_stack, tiny_t5

from fluidscale import encode, sample
from fluidscale.data import captioned
from fluidscale.data.sources import CaptionedRows, check_features, open_source
from fluidscale.record import Placement, read_json
from fluidscale.run import main, run
from fluidscale.spec import ARMS, InvalidInput, to_json
from fluidscale.sweep import load_sweep
from fluidscale.tokens.text import TextEncoder
from slurm.placement import load_profile, place


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return saved_stack(tmp_path_factory.mktemp("stack"))


@pytest.fixture
def planned(stack):
    """Run and placement of an arm, as `make plan` makes them."""

    def plan(arm, name="pictures"):
        sweep = load_sweep(str(stack / f"{name}.yaml"), arms=[arm])
        return sweep.runs[0], place(sweep.runs[0], load_profile("cpu"), (), sweep.assets)

    return plan


@pytest.mark.parametrize("arm", ARMS)
def test_from_pictures_to_pictures(stack, planned, arm):
    spec, placement = planned(arm)
    assert spec.data.images_unique == 16 and spec.model.text_width == 12 and spec.model.text_vocab_size == 0
    assert set(placement.assets) == {spec.data.manifest_sha256, spec.tokenizer_sha256, spec.text_encoder_sha256}
    folder = stack / "runs" / spec.id
    record = run(spec, folder, placement)
    assert record["status"] == "done" and record["images"] == 48 and record["images_unique"] == 16
    assert np.isfinite(record["val_loss"]) and record["val_loss_n"] == 4 and record["val_loss_se"] > 0
    assert record["text_encoder"] == "t5-12" and record["tokenizer_sha"] == spec.tokenizer_sha256[:12]
    assert sample.main([str(folder), "a red cat", "--num-images", "2", "--out", str(folder / "grid.png")]) == 0
    assert np.asarray(Image.open(folder / "grid.png")).std() > 1


def test_one_process_or_two_train_the_same_model(stack, planned, tmp_path):
    spec, placement = planned("discrete-random")
    spec = dataclasses.replace(spec, seed=1)
    alone = run(spec, tmp_path / "one" / spec.id, placement)
    two = dataclasses.replace(placement, strategy="ddp", devices=2)
    together = run(spec, tmp_path / "two" / spec.id, two)
    assert together["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)


def test_live_features_train_the_same_model_as_cached_ones(stack, planned, tmp_path):
    assert encode.main(encoding(stack, "vq", "live-shards", "--text-features", "live")) == 0
    assert not list((stack / "live-shards").glob("*features*"))
    text = (stack / "pictures.yaml").read_text().replace("vq-shards", "live-shards")
    (stack / "live.yaml").write_text(text)
    losses = []
    for name in ("pictures", "live"):
        spec, placement = planned("discrete-raster", name)
        source = open_source(spec, placement, tmp_path)
        rows, visits = np.arange(8), np.arange(8)
        losses.append((run(spec, tmp_path / spec.id, placement)["val_loss"], source.training().gather(rows, visits)))
    (cached_loss, (tokens, cached)), (live_loss, (again, live)) = losses
    assert torch.equal(tokens, again) and torch.equal(cached.mask, live.mask)
    torch.testing.assert_close(cached.values, live.values, rtol=0.05, atol=0.05)
    assert live_loss == pytest.approx(cached_loss, rel=1e-2)


def test_features_of_another_encoder_are_noticed_at_the_start(stack, planned, tmp_path):
    spec, placement = planned("discrete-raster")
    shards = open_source(spec, placement, tmp_path)._shards()
    check_features(shards, TextEncoder(stack / "t5", "bfloat16", 6))
    other = TextEncoder(stack / "t5", "bfloat16", 6)
    with torch.no_grad():
        next(other._network.parameters()).mul_(1.2)
    with pytest.raises(InvalidInput, match="off those of t5-12 here"):
        check_features(shards, other)


def test_dropped_and_empty_captions_become_the_null(stack, planned, tmp_path):
    from fluidscale.model.build import build

    spec, placement = planned("discrete-raster")
    rows: CaptionedRows = open_source(spec, placement, tmp_path).training()
    _, text = rows.gather(np.arange(4), np.zeros(4, np.int64))
    assert 0 < text.mask.sum() < text.mask.numel()
    encoder = build(spec.model).text
    drop = torch.tensor([True, False, False, False])
    dropped, kept = encoder(text, drop).values, encoder(text, None).values
    assert torch.equal(dropped[0], encoder.null.expand_as(dropped[0])) and torch.equal(dropped[1:], kept[1:])
    # What stands where there is no token reaches nothing.
    noise = torch.where(text.mask[..., None], text.values, torch.randn(4, 6, 12).bfloat16())
    shown = encoder(dataclasses.replace(text, values=noise), None).values
    assert torch.equal(shown[:, :6][text.mask], kept[:, :6][text.mask])


def refused(spec, placement, folder, capsys):
    folder.mkdir(parents=True)
    (folder / "asked.json").write_text(to_json(spec))
    (folder / "where.json").write_text(json.dumps(dataclasses.asdict(placement)))
    words = [str(folder / "asked.json"), "--dir", str(folder / "run"), "--placement", str(folder / "where.json")]
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    left = {path.suffix for path in (folder / "run").rglob("*")}
    assert not left & {".ckpt", ".safetensors", ".jsonl"} and not (folder / "run" / "record.json").exists()
    return line


def test_a_run_on_other_data_ends_in_one_line(stack, planned, tmp_path, capsys):
    spec, placement = planned("discrete-raster")

    def moved(sha256, folder):
        return dataclasses.replace(placement, assets={**placement.assets, sha256: str(folder)})

    line = refused(spec, moved(spec.data.manifest_sha256, stack / "vae-shards"), tmp_path / "a", capsys)
    assert "which the run names" in line
    line = refused(spec, moved(spec.tokenizer_sha256, stack / "vae"), tmp_path / "b", capsys)
    assert "this tokenizer is" in line
    tiny_t5(tmp_path / "wider", width=24)
    line = refused(spec, moved(spec.text_encoder_sha256, tmp_path / "wider"), tmp_path / "c", capsys)
    assert "this text encoder is" in line
    line = refused(spec, Placement(device="cpu"), tmp_path / "d", capsys)
    assert "does not say where it is" in line
    model = dataclasses.replace(spec.model, text_width=24)
    line = refused(dataclasses.replace(spec, model=model), placement, tmp_path / "e", capsys)
    assert "text width 12, the run has 24" in line
    shutil.copytree(stack / "vq-shards", tmp_path / "cut")
    path = tmp_path / "cut" / "part-00000-features.npy"
    path.write_bytes(path.read_bytes()[:-7])
    line = refused(spec, moved(spec.data.manifest_sha256, tmp_path / "cut"), tmp_path / "f", capsys)
    assert "part-00000-features.npy" in line and "the manifest says" in line


def test_a_sweep_names_its_shards_and_reads_the_rest_from_them(stack, planned, tmp_path):
    spec, _ = planned("continuous-raster")
    manifest = read_json(stack / "vae-shards" / "manifest.json")
    assert (spec.model.grid, spec.model.token_channels) == (4, 16)
    assert spec.text_encoder_sha256 == manifest["text"]["sha256"] and spec.data.name == "pictures"
    text = (stack / "pictures.yaml").read_text()
    for before, after, message in (
        ("vae-shards", "gone-shards", "python -m fluidscale.encode"),
        ("tokenizer: " + str(stack / "vae"), "tokenizer: " + str(stack / "gone"), "no such file or folder"),
        ("vae-shards", "vq-shards", "cannot use the discrete tokenizer"),
        ("val_images: 4", "val_images: 5", "4 validation images, 5 asked for; lower evaluate.val_images"),
    ):
        assert before in text
        (tmp_path / "bad.yaml").write_text(text.replace(before, after))
        with pytest.raises(InvalidInput, match=message):
            load_sweep(str(tmp_path / "bad.yaml"), arms=["continuous-raster"])


def test_validation_images_may_be_those_of_other_shards(stack, planned, tmp_path, capsys):
    assert encode.main(encoding(stack, "vq", "other-shards", "--val-images", "6")) == 0
    text, own = (stack / "pictures.yaml").read_text(), f"data: {{shards: {stack / 'vq-shards'}"
    assert own in text and "val_images: 4" in text
    for name, others in (("other", "other-shards"), ("unlike", "vae-shards")):
        named = text.replace(own, f"{own}, val_shards: {stack / others}").replace("val_images: 4", "val_images: 6")
        (stack / f"{name}.yaml").write_text(named)
    with pytest.raises(InvalidInput, match=r"its tokenizer is .*; encode both alike"):
        planned("discrete-raster", "unlike")
    spec, placement = planned("discrete-raster", "other")
    plain, _ = planned("discrete-raster")
    assert spec.id != plain.id and spec.trunk_id == plain.trunk_id and spec.data.images_unique == 16
    (tmp_path / "alone.yaml").write_text(text.replace(own, f"data: {{val_shards: {stack / 'other-shards'}"))
    with pytest.raises(InvalidInput, match=r"data\.val_shards: only beside data\.shards"):
        load_sweep(str(tmp_path / "alone.yaml"), arms=["discrete-raster"])
    record = run(spec, tmp_path / spec.id, placement)
    assert record["val_loss_n"] == 6
    assert spec.data.val_manifest_sha256 is not None
    source = open_source(spec, placement, tmp_path)
    tokens, _ = source.validation(0, 6)
    shards = captioned.CaptionedShards(stack / "other-shards", "val", spec.data.val_manifest_sha256)
    assert torch.equal(tokens, shards.tokens(np.arange(6)).long())
    del placement.assets[spec.data.val_manifest_sha256]
    assert "validation shards: the placement does not say where" in refused(spec, placement, tmp_path / "lost", capsys)


def test_a_sweep_can_be_planned_before_anything_is_encoded(stack, tmp_path):
    text = (stack / "pictures.yaml").read_text()
    declared = "tokenizer: {kind: discrete, grid: 16, channels: 0, vocab_size: 8192}"
    text = text.replace(f"tokenizer: {stack / 'vq'}", declared)
    text = text.replace(f"data: {{shards: {stack / 'vq-shards'}}}", "data: {images_unique: 1000}")
    text = text.replace(
        "model: {aligner_depth", "model: {text_vocab_size: 0, text_width: 9, text_length: 5, aligner_depth"
    )
    (tmp_path / "planned.yaml").write_text(text)
    sweep = load_sweep(str(tmp_path / "planned.yaml"), arms=["discrete-raster"])
    assert sweep.runs[0].model.vocab_size == 8192 and sweep.assets == {}
    with pytest.raises(InvalidInput, match="planned only"):
        sweep.require_data()
    with pytest.raises(InvalidInput, match="planned only"):
        open_source(sweep.runs[0], Placement(), tmp_path)


def test_as_many_files_may_be_open_as_the_parts_need():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        captioned._allow_files(50)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
        captioned._allow_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 812) > 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
