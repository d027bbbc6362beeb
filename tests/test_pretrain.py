"""A network is trained by one command, sealed with its card, and loaded again; bad input costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fluidscale import pretrain
from fluidscale.evaluate.detect import DetectorNetwork, load_detector
from fluidscale.evaluate.features import load_features
from fluidscale.spec import InvalidInput, digest
from fluidscale.sweep import load_world
from fluidscale.tokens.image import load_tokenizer
from fluidscale.world import World

TINY = """
resolution: 16
classes: [apple, car]
colors: [red, blue]
max_objects: 2
icon_sizes: [10, 7]
position_step: 2
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five networks of a world of the user's own, a few steps each, by the commands a user types."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "tiny.yaml").write_text(TINY)
    patch = pytest.MonkeyPatch()
    patch.setattr(pretrain, "HELD_OUT_COUNT", 64)
    patch.setattr(pretrain, "references", _few(pretrain.references))
    for target in (*pretrain.RECIPES, "measure"):
        steps = [] if target == "measure" else ["--steps", "12"]
        assert pretrain.main([target, "--world", str(folder / "tiny.yaml"), "--out", str(folder), *steps]) == 0
    patch.undo()
    return folder


def _few(measure):
    """The real measurement on fewer images."""
    return lambda *parts, **named: measure(*parts, **named, fd_images=64)


def card_of(folder: Path, target: str) -> dict:
    return json.loads((folder / f"tiny-{target}.json").read_text())


def test_every_network_loads_from_its_folder(trained: Path):
    images = World(load_world(str(trained / "tiny.yaml"))).scenes(0, 3)[0]
    for target in ("vae", "vq"):
        tokenizer = load_tokenizer(str(trained / f"tiny-{target}.safetensors"))
        assert tokenizer.grid == 2 and pretrain.reconstruct(tokenizer, images).shape == images.shape
    for target in ("detector", "detector2"):
        detector = load_detector(str(trained / f"tiny-{target}.safetensors"))
        assert detector.classes == ("apple", "car") and len(detector.detect(images)) == 3
    assert load_features(str(trained / "tiny-features.safetensors"))(images).shape == (3, 64)


def test_cards_say_what_was_done(trained: Path):
    spec = load_world(str(trained / "tiny.yaml"))
    for target, recipe in pretrain.RECIPES.items():
        card = card_of(trained, target)
        assert card["name"] == f"tiny-{target}" and card["world_sha256"] == digest(spec)
        assert card["recipe"]["steps"] == 12 and card["recipe"]["lr"] == recipe.lr
        assert card["command"].startswith(f"python -m fluidscale.pretrain {target} --world") and card["seconds"] > 0
    assert card_of(trained, "vae")["psnr"] > 5 and card_of(trained, "vq")["codes_used"] >= 1
    assert {"geneval_real", "geneval_floor", "geneval_ceiling_vae", "geneval_ceiling_vq", "ghost_share"} <= set(
        card_of(trained, "detector")
    )


def test_references_join_the_tokenizers_cards(trained: Path):
    judges = {card_of(trained, "detector")["sha256"], card_of(trained, "features")["sha256"]}
    for target in ("vae", "vq"):
        card = card_of(trained, target)
        assert {card["detector_sha256"], card["features_sha256"]} == judges
        # An untrained tokenizer is far worse than none: the floor of its images lies above that of real ones.
        assert card["fd_floor"] > card["fd_real_floor"] >= 0 and "geneval_ceiling" in card
        tokenizer = load_tokenizer(str(trained / f"tiny-{target}.safetensors"))
        assert tokenizer.references["fd_floor"] == card["fd_floor"]


def test_the_same_command_gives_the_same_weights_and_another_seed_others(trained: Path, tmp_path: Path):
    world = ["--world", str(trained / "tiny.yaml"), "--out", str(tmp_path), "--steps", "3"]
    hashes = []
    for seed in ("4", "4", "5"):
        assert pretrain.main(["vq", *world, "--seed", seed]) == 0
        hashes.append(card_of(tmp_path, "vq")["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("kind", ["vae", "vq", "detector", "features"])
def test_training_learns(kind: str):
    """Each loss falls clearly within some steps on one batch, so the recipe's gradient reaches what it should."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workshop = pretrain.Workshop("icons32", Path("nowhere"))
    recipe = pretrain.replace(pretrain.RECIPES[kind], steps=40, batch=8)
    network = workshop.network(workshop.card(kind, recipe, ""))
    if kind == "vq":
        network.warmup = 10
    losses: list[float] = []
    one = pretrain.material(recipe.kind, recipe.batch, workshop.world, 0)
    pretrain.train(network, recipe, [one] * recipe.steps, workshop.loss(recipe), lambda step, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def test_pairs_count_objects():
    world = World(load_world("icons32"))
    scenes = world.describe(0, 50, "all")
    counts = pretrain.pairs(world, scenes)
    assert counts.sum(axis=(1, 2)).tolist() == [len(scene.objects) for scene in scenes]
    icon = scenes[0].objects[0]
    color = world.spec.colors.index(icon.color) if icon.color else len(world.spec.colors)
    assert counts[0, world.spec.classes.index(icon.cls), color] >= 1


def test_psnr_of_known_errors():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    other = images.copy()
    other[0] += 10
    other[1] += 1
    assert pretrain.psnr(images, other) == pytest.approx((20 * np.log10(25.5) + 20 * np.log10(255)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae", "--world", "icons33"], "icons32"),
        (["vae", "--steps", "0"], "at least 1"),
        (["vae", "--seed", "-1"], "at least 0"),
        (["vae", "--out", "/dev/null/x"], "--out"),
        (["measure", "--out", "nowhere"], "not readable"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert pretrain.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_resolution_that_cannot_be_halved_thrice_is_refused(tmp_path: Path):
    (tmp_path / "odd.yaml").write_text(TINY.replace("16", "20"))
    with pytest.raises(InvalidInput, match="divisible"):
        pretrain.Workshop(str(tmp_path / "odd.yaml"), tmp_path)


def test_a_loss_that_is_no_number_stops_the_training():
    recipe = pretrain.replace(pretrain.RECIPES["detector"], steps=2)
    network = DetectorNetwork("tower", [4], num_classes=2, num_colors=2)
    with pytest.raises(FloatingPointError, match="step 0"):
        pretrain.train(network, recipe, [0], lambda net, _: net.trunk.layers[1].weight.sum() * np.nan, lambda *_: None)
