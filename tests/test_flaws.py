"""What judges are trained on: pictures with a generator's flaws, and a rule for what is still there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fluidscale.evaluate.detect import Target
from fluidscale.evaluate.flaws import SHAKEN, Pictures, judged_views, mingle, shake
from fluidscale.pretrain import batch, seconds, targets
from fluidscale.sweep import load_world
from fluidscale.tokens.image import load_tokenizer, to_pixels
from fluidscale.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World(load_world("icons32"))


@pytest.fixture(scope="module")
def both(world: World) -> tuple[Pictures, Pictures]:
    images, scenes = batch(world, 0, 64)
    return Pictures(images, targets(world, scenes)), seconds(world, scenes, 0)


def test_every_other_second_shows_the_same_content_in_places_of_its_own(world: World, both):
    own, others = both

    def named(pictures: Pictures, i: int) -> list[tuple[int, int]]:
        return sorted(target[:2] for target in pictures.objects[i])

    assert all(named(own, i) == named(others, i) for i in range(0, 64, 2))
    assert all(own.objects[i + 1] == others.objects[i] for i in range(1, 63, 2))
    assert np.mean([own.objects[i] != others.objects[i] for i in range(0, 64, 2)]) > 0.8


@pytest.mark.parametrize("name", ["icons32-vae", "icons32-vq"])
def test_mingled_pictures_show_what_their_objects_say(both, name: str):
    """Objects are the picture's own or the second's: many stay, many are spoilt, few come."""
    own, others = both
    torch.manual_seed(0)
    mingled = mingle(load_tokenizer(name), own, others)
    assert mingled.images.shape == own.images.shape and mingled.images.dtype == np.uint8
    kept = lost = gained = 0
    for mine, other, found in zip(own.objects, others.objects, mingled.objects, strict=True):
        assert set(found) <= set(mine) | set(other) and len(found) == len(set(found))
        kept, lost = kept + len(set(mine) & set(found)), lost + len(set(mine) - set(found))
        gained += len((set(other) - set(mine)) & set(found))
    assert lost > 0.2 * (kept + lost) and kept > 0.2 * (kept + lost) and gained < kept


def test_an_icon_counts_only_where_it_is_whole(monkeypatch: pytest.MonkeyPatch):
    """On a tokenizer whose four tokens are the quarters of the picture, with the left half taken from the second."""

    class Quarters:
        grid, resolution = 2, 32

        def encode(self, images: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(images[:, 0, 0, :1].astype(np.int64)).expand(-1, 4)

        def sample(self, moments: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
            return moments

        def decode(self, tokens: torch.Tensor) -> np.ndarray:
            self.seen = tokens
            return np.zeros((len(tokens), 32, 32, 3), np.uint8)

    def target(kind: int, left: float) -> Target:
        return Target(kind, 0, left, 4.0, left + 14, 18.0)

    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([[0.1, 0.8, 0.2, 0.9]]))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.full((1, 1), 2))
    right, nearly_right, cut, left, in_both = (target(k, x) for k, x in enumerate((18, 15, 10, 1, 9)))
    blank = np.zeros((1, 32, 32, 3), np.uint8)
    tokenizer: Any = Quarters()
    first = Pictures(blank, [[right, nearly_right, cut, left, in_both]])
    second = Pictures(blank + 1, [[left._replace(cls=5), right._replace(cls=6), in_both._replace(x0=11.0, x1=25.0)]])
    mingled = mingle(tokenizer, first, second)
    assert tokenizer.seen.tolist() == [[1, 0, 1, 0]]
    assert mingled.objects == [[right, nearly_right, in_both, left._replace(cls=5)]]


def test_what_detectors_learn_from_stays_a_picture(both):
    own, others = both
    before = [list(objects) for objects in own.objects]
    torch.manual_seed(0)
    views = judged_views(own, others, [load_tokenizer("icons32-vae"), load_tokenizer("icons32-vq")])
    assert views.pixels.shape == (64, 3, 32, 32) and views.pixels.abs().max() <= 1
    changed = (views.pixels - to_pixels(own.images)).abs().amax(dim=(1, 2, 3)) > 0
    assert 0.5 < changed.float().mean() < 0.95
    assert (views.pixels - to_pixels(own.images)).abs().mean() < 0.25
    others_found = [new != old for new, old in zip(views.objects, before, strict=True)]
    assert 0.05 < np.mean(others_found) < 0.5 and own.objects == before


def test_shaken_pictures_show_each_place_from_a_few_pixels_beside_it():
    """A picture whose colours are its coordinates tells from where each pixel came."""
    rows, columns = np.mgrid[0:32, 0:32].astype(np.uint8)
    images = np.stack([np.stack([rows, columns, rows], axis=-1)] * 40)
    torch.manual_seed(0)
    shaken = shake(images, grid=4).astype(int)
    moves = (shaken - images)[..., :2]
    assert np.abs(moves).max() == SHAKEN
    inner = moves.reshape(40, 4, 8, 4, 8, 2)[:, 1:3, :, 1:3]
    assert (inner == inner[:, :, :1, :, :1]).all(), "a token's place moves as one, away from the edge"
    assert len(np.unique(inner[:, :, 0, :, 0].reshape(40, -1), axis=0)) > 30
