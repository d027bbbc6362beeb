"""The shipped tokenizers are what their cards say, and damage is refused before it can spoil a result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluidscale.inputs import read_card
from fluidscale.pretrain import psnr, reconstruct
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_world
from fluidscale.tokens import shipped
from fluidscale.tokens.image import Tokenizer, load_tokenizer, to_images, to_pixels
from fluidscale.tokens.networks import COMMITMENT, KLAutoencoder, VQAutoencoder
from fluidscale.world import World

NAMES = ("icons32-vae", "icons32-vq")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return World(load_world("icons32")).scenes(5_000_000, 256, "seen")[0]


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest):
    return load_tokenizer(request.param)


def test_shapes_and_types_are_the_protocol(tokenizer, images):
    assert isinstance(tokenizer, Tokenizer)
    tokens = tokenizer.encode(images[:5])
    length = tokenizer.grid**2
    if tokenizer.kind == "discrete":
        assert tokens.shape == (5, length) and tokens.dtype == torch.int64
        assert tokenizer.channels == 0 and int(tokens.max()) < tokenizer.vocab_size
    else:
        assert tokens.shape == (5, length, 2 * tokenizer.channels) and tokens.dtype == torch.float32
        assert tokenizer.vocab_size == 0 and (tokens[..., tokenizer.channels :] > 0).all()
    decoded = tokenizer.decode(tokenizer.sample(tokens, torch.Generator().manual_seed(0)))
    assert decoded.shape == images[:5].shape and decoded.dtype == np.uint8


def test_quality_on_fresh_scenes_is_that_of_the_card(tokenizer, images):
    name = NAMES[tokenizer.kind == "discrete"]
    card = shipped.card(name)
    assert psnr(images, reconstruct(tokenizer, images)) == pytest.approx(card["psnr"], abs=0.5)
    assert card["psnr"] > 22 and card["bytes"] < 3e6
    assert card["sha256"] == tokenizer.sha256 and card["command"].startswith("python -m fluidscale.pretrain")


def test_an_image_s_tokens_do_not_depend_on_its_batch(tokenizer, images):
    together = tokenizer.encode(images)
    alone = torch.cat([tokenizer.encode(images[k : k + 1]) for k in (0, 100, 255)])
    torch.testing.assert_close(together[[0, 100, 255]], alone, rtol=1e-3, atol=1e-4)


def test_latents_have_unit_variance_per_channel(images):
    tokenizer = load_tokenizer("icons32-vae")
    latents = tokenizer.sample(tokenizer.encode(images), torch.Generator().manual_seed(1)).flatten(0, 1)
    assert latents.mean(0).abs().max() < 0.15
    assert (latents.std(0) - 1).abs().max() < 0.15


def test_sampling_is_the_generator_s(images):
    tokenizer = load_tokenizer("icons32-vae")
    moments = tokenizer.encode(images[:2])
    first, again, other = (tokenizer.sample(moments, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    mean, deviation = moments.chunk(2, dim=-1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first, mean + deviation * noise)


def test_most_codes_are_used(images):
    tokenizer = load_tokenizer("icons32-vq")
    assert len(tokenizer.encode(images).unique()) > 600  # 4096 tokens in all
    assert shipped.card("icons32-vq")["codes_used"] >= 1000


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(2, 15, dtype=torch.long), torch.full((2, 16), 1024), torch.full((2, 16), -1), torch.zeros(2, 16)],
)
def test_codes_that_do_not_exist_are_refused(tokens):
    with pytest.raises(InvalidInput, match="codes"):
        load_tokenizer("icons32-vq").decode(tokens)


def test_latents_and_images_of_another_shape_are_refused(tokenizer):
    with pytest.raises(InvalidInput, match="expected"):
        load_tokenizer("icons32-vae").decode(torch.zeros(2, 16, 3))
    for wrong in (np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 32, 32, 3), np.float32)):
        with pytest.raises(InvalidInput, match="expected uint8 images"):
            tokenizer.encode(wrong)


def test_a_tokenizer_is_found_by_its_hash(tokenizer):
    assert load_tokenizer(tokenizer.sha256).kind == tokenizer.kind


def test_damage_is_refused(tmp_path: Path):
    for suffix in (".safetensors", ".json"):
        shutil.copy(shipped.CARDS / f"icons32-vq{suffix}", tmp_path)
    path = tmp_path / "icons32-vq.safetensors"
    load_tokenizer(str(path))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match="sha256"):
        load_tokenizer(str(path))
    path.unlink()
    with pytest.raises(InvalidInput, match="not readable"):
        load_tokenizer(str(path))
    path.with_suffix(".json").write_text("{")
    with pytest.raises(InvalidInput, match="not a card"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "change, planning, loading",
    [
        ({"grid": None}, "missing grid", "missing grid"),
        ({"resolution": None}, "", "missing resolution"),
        ({"kind": "features"}, "unknown 'features'", "not a tokenizer"),
        ({"vocab_size": 512}, "", "does not describe its weights"),
        ({"network": None}, "", "lacks 'network'"),
        ({"network": {"widths": [8]}}, "", "lacks 'code_width'"),
    ],
)
def test_a_card_that_is_not_of_its_weights_is_refused_in_one_line(tmp_path, change, planning, loading):
    for suffix in (".safetensors", ".json"):
        shutil.copy(shipped.CARDS / f"icons32-vq{suffix}", tmp_path)
    path = tmp_path / "icons32-vq.safetensors"
    card = json.loads(path.with_suffix(".json").read_text()) | change
    path.with_suffix(".json").write_text(json.dumps({key: value for key, value in card.items() if value is not None}))
    if planning:
        with pytest.raises(InvalidInput, match=planning):
            read_card(str(path), "sweep.yaml")
    else:
        assert read_card(str(path), "sweep.yaml")["sha256"] == card["sha256"]
    with pytest.raises(InvalidInput, match=loading) as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_known_and_judges_are_no_tokenizers():
    with pytest.raises(InvalidInput, match="shipped: icons32-vae"):
        load_tokenizer("icons33-vae")
    with pytest.raises(InvalidInput, match="not a tokenizer"):
        load_tokenizer("icons32-detector")


def test_cards_are_read_without_torch():
    code = (
        "import sys; from fluidscale.tokens.shipped import shipped_cards; "
        "assert 'icons32-vae' in shipped_cards(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stored_cards_are_sealed(tmp_path: Path):
    card = shipped.store(tmp_path / "a.safetensors", b"weights", {"kind": "continuous"})
    assert json.loads((tmp_path / "a.json").read_text()) == card
    assert shipped.verified(str(tmp_path / "a.safetensors")) == (b"weights", card)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_pixels_survive_the_scaling(seed: int):
    images = np.random.default_rng(seed).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_images(to_pixels(images)), images)


def test_nearest_code_and_codebook_average():
    torch.manual_seed(0)
    network = VQAutoencoder([4, 4, 4], channels=3, vocab_size=8, decay=0.5)
    latents = torch.randn(50, 3)
    nearest = torch.cdist(latents, network.codebook).argmin(1)
    assert torch.equal(network.codes(latents), nearest)
    network.counts.fill_(2.0)
    network.sums.copy_(2.0 * network.codebook)
    sums = network.codebook + 0.5 * torch.zeros(8, 3).index_add_(0, nearest, latents)
    counts = 1.0 + 0.5 * torch.bincount(nearest, minlength=8)
    network._follow(latents, nearest)
    torch.testing.assert_close(network.codebook, sums / counts[:, None])


def test_dead_codes_come_back_to_life():
    torch.manual_seed(0)
    network = VQAutoencoder([4, 4, 4], channels=3, vocab_size=8)
    latents = torch.randn(64, 3)
    network.codebook[5] = 1e6
    network.counts[5] = 0.0
    network._follow(latents, network.codes(latents))
    assert torch.cdist(network.codebook[5:6], latents).min() < 1e-5


def test_the_encoder_gets_its_gradient_through_the_codes():
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    network = VQAutoencoder([4, 4, 4], channels=3, vocab_size=8)
    latents = network.encoder(pixels)
    quantised = network.codebook[network.codes(latents.movedim(1, -1).flatten(0, 2))].view(2, 2, 2, 3).movedim(-1, 1)
    output = network.decoder(quantised)
    wanted = (output - pixels).abs().mean() + ((output - pixels) ** 2).mean()
    wanted = wanted + COMMITMENT * ((latents - quantised) ** 2).mean()
    loss = network.loss(pixels)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.encoder.parameters())


def test_kl_is_that_of_gaussians():
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    network = KLAutoencoder([4, 4, 4], channels=3, kl_weight=1.0)
    mean, std = network.moments(pixels)
    posterior = torch.distributions.Normal(mean, std)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.manual_seed(1)
    whole = network.loss(pixels)
    network.kl_weight = 0.0
    torch.manual_seed(1)
    torch.testing.assert_close(whole - network.loss(pixels), kl)
