"""The detectors see what is there, are sure of it, and see nothing else; the feature network tells scenes apart."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from fluidscale.evaluate import detect, golden
from fluidscale.evaluate.detect import (
    NEAR,
    DetectorNetwork,
    IconDetector,
    Target,
    _heat_targets,
    load_detector,
)
from fluidscale.evaluate.distances import frechet, moments
from fluidscale.evaluate.features import load_features
from fluidscale.evaluate.geneval import grouped, judge_images
from fluidscale.evaluate.references import prompt_scenes
from fluidscale.kept import Kept
from fluidscale.pretrain import HELD_OUT_START, batch, certainty
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_world
from fluidscale.tokens.shipped import card
from fluidscale.world import World

NAMES = ("icons32-detector", "icons32-detector2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world() -> World:
    return World(load_world("icons32"))


@pytest.fixture(scope="module", params=NAMES)
def detector(request: pytest.FixtureRequest) -> IconDetector:
    return load_detector(request.param)


def test_real_scenes_score_as_the_card_says_and_shuffled_prompts_near_chance(detector, world):
    prompts, images = prompt_scenes(world, "seen", images_per_prompt=1, seed=3)
    right = grouped(judge_images(images, prompts, detector), prompts)
    assert right.overall.value >= 0.97
    assert min(rate.value for rate in right.tags.values()) >= 0.93
    shuffled = [prompts[k] for k in np.random.default_rng(0).permutation(len(prompts))]
    assert grouped(judge_images(images, shuffled, detector), shuffled).overall.value <= 0.08
    assert card(detector.name)["geneval_real"] >= 0.97


def test_held_out_combinations_are_seen_too(detector, world):
    prompts, images = prompt_scenes(world, "unseen", images_per_prompt=1, seed=4)
    assert grouped(judge_images(images, prompts, detector), prompts).overall.value >= 0.95


def test_scores_are_sure_of_objects_and_of_their_absence(detector, world):
    images, scenes = batch(world, HELD_OUT_START + 10**6, 256)
    measured = certainty(detector, images, scenes)
    assert measured["sure_share"] > 0.97 and measured["ghost_share"] < 0.02


def test_boxes_lie_on_their_objects(detector, world):
    images, scenes = batch(world, HELD_OUT_START + 2 * 10**6, 128)
    errors = []
    for scene, found in zip(scenes, detector.detect(images), strict=True):
        for icon in scene.objects:
            of_class = [one for one in found if one.cls == icon.cls and one.score > 0.3]
            if of_class:
                errors.append(min(max(abs(np.subtract(one.box, icon.box))) for one in of_class))
    assert np.median(errors) < 1.0 and np.quantile(errors, 0.95) < 2.5


def test_candidates_are_best_first_in_the_detector_s_own_words(detector, world):
    images, _ = batch(world, HELD_OUT_START, 64)
    for found in detector.detect(images):
        scores = [one.score for one in found]
        assert scores == sorted(scores, reverse=True) and all(0.05 < score <= 1 for score in scores)
        assert all(one.cls in detector.classes and one.color in detector.colors for one in found)
    assert detector.detect(images[:0]) == []


def test_nothing_is_seen_where_there_is_nothing(detector):
    plain = np.full((4, 32, 32, 3), 210, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for found in detector.detect(np.concatenate((plain, noise))):
        assert not [one for one in found if one.score > 0.9]


def test_the_two_detectors_are_independent_and_agree(world):
    first, second = (load_detector(name) for name in NAMES)
    assert card(NAMES[0])["network"] != card(NAMES[1])["network"]
    assert card(NAMES[0])["recipe"]["seed"] != card(NAMES[1])["recipe"]["seed"]
    images, scenes = batch(world, HELD_OUT_START + 3 * 10**6, 256)
    # Untinted icons have no named colour: the two may name different ones.
    tinted = [all(icon.color for icon in scene.objects) for scene in scenes]

    def verdicts(detector: IconDetector) -> list[Counter]:
        found = zip(detector.detect(images), tinted, strict=True)
        return [Counter((d.cls, d.color if colored else "") for d in one if d.score > 0.3) for one, colored in found]

    agreed = [a == b for a, b in zip(verdicts(first), verdicts(second), strict=True)]
    assert np.mean(agreed) > 0.95 and np.mean(np.array(agreed)[tinted]) > 0.9


def test_targets_mark_touching_cells_and_leave_the_near_ones_open():
    heat = torch.zeros(2, 3, 16, 16)
    objects = [[Target(cls=1, color=2, x0=8.0, y0=4.0, x1=24.0, y1=14.0)], []]
    wanted, weight, rows = _heat_targets(objects, heat)
    # The centre (16, 9) lies between columns 7 and 8, in the middle of row 4.
    assert wanted.nonzero().tolist() == [[0, 1, 4, 7], [0, 1, 4, 8]]
    assert weight[1].min() == 1 and weight[0, 0].min() == 1
    columns = [x for x in range(16) if abs(2 * x + 1 - 16) <= NEAR]
    lines = [y for y in range(16) if abs(2 * y + 1 - 9) <= NEAR]
    assert (weight[0, 1] == 0).sum() == len(columns) * len(lines) - 2
    corner = torch.tensor([2 * 7 + 1, 2 * 4 + 1] * 2)
    torch.testing.assert_close(rows.box[0] * 16 + corner, torch.tensor([8.0, 4.0, 24.0, 14.0]))
    assert rows.color.tolist() == [2, 2] and rows.image.tolist() == [0, 0]


def test_loss_of_a_perfect_answer_is_nearly_nothing_and_of_none_is_not(monkeypatch):
    network = DetectorNetwork("tower", [4], num_classes=3, num_colors=2)
    objects = [[Target(cls=1, color=0, x0=8.0, y0=4.0, x1=24.0, y1=14.0)]]
    wanted, _, rows = _heat_targets(objects, torch.zeros(1, 3, 16, 16))
    boxes, colors = torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16)
    boxes[rows.image, :, rows.y, rows.x] = rows.box
    colors[:, 0] = 20.0
    monkeypatch.setattr(network, "forward", lambda pixels: (40 * wanted - 20, boxes, colors))
    assert network.loss(torch.zeros(1, 3, 32, 32), objects) < 1e-4
    assert network.loss(torch.zeros(1, 3, 32, 32), [[]]) > 10  # two ghosts


def test_a_scene_without_objects_can_be_learnt_from():
    network = DetectorNetwork("pyramid", [4, 4, 4], num_classes=3, num_colors=2)
    assert math.isfinite(network.loss(torch.zeros(1, 3, 32, 32), [[]]).item())


def test_judges_are_not_confused():
    with pytest.raises(InvalidInput, match="not a detector"):
        load_detector("icons32-vae")
    with pytest.raises(InvalidInput, match="not a feature network"):
        load_features("icons32-detector")


def test_a_shipped_judge_gives_what_it_gave_when_it_was_made():
    """Whoever trains one anew runs `python -m fluidscale.evaluate.keep_golden`."""
    kept = json.loads(golden.SHIPPED.read_text())
    for name in (*NAMES, "icons32-features"):
        assert card(name)["sha256"] in kept, name


def test_a_broken_kernel_stops_a_shipped_judge(monkeypatch):
    convolution = torch.nn.Conv2d.forward

    def broken(self, x):
        return torch.nn.functional.pad(convolution(self, x)[..., 1:], (0, 1))

    monkeypatch.setattr(torch.nn.Conv2d, "forward", broken)
    # A process tests a judge when it first loads it: this one has not yet.
    monkeypatch.setattr(detect, "_DETECTORS", Kept(4))
    for load, name in ((load_detector, NAMES[0]), (load_detector, NAMES[1]), (load_features, "icons32-features")):
        with pytest.raises(InvalidInput, match=f"{name}: on the fixed pictures this judge now differs by"):
            load(name)


def test_features_tell_distributions_apart(world):
    network = load_features("icons32-features")
    images = world.scenes(7_000_000, 768, "seen")[0]
    values = network(images)
    assert values.shape == (768, 64) and values.dtype == np.float32
    np.testing.assert_allclose(network(images[10:12]), values[10:12], atol=1e-3)
    reference = moments(values[:512])
    same = frechet(moments(values[512:]), reference)
    blurred = (images[512:, ::2, ::2].repeat(2, 1).repeat(2, 2)).astype(np.uint8)
    assert frechet(moments(network(blurred)), reference) > 2 * same
    assert network(images[:0]).shape == (0, 64)
