"""The drawings: all there, seen in their colour, apart from their background."""

from __future__ import annotations

import numpy as np
import pytest

from fluidscale.objects import CLASSES, COLORS, OPENMOJI
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_world
from fluidscale.world import World
from fluidscale.world.backgrounds import MIN_CONTRAST, lab
from fluidscale.world.icons import OWN_SVG, body, master, sprite, tinted


@pytest.fixture(scope="module")
def small() -> World:
    return World(load_world("icons32"))


def test_every_class_has_a_drawing_and_fourteen_are_ours():
    assert len(CLASSES) == 80
    own = {f"{name.replace(' ', '-')}.svg" for name, code in OPENMOJI.items() if code is None}
    assert len(own) == 14 and own == {path.name for path in OWN_SVG.iterdir()}
    drawings = {np.asarray(master(name).resize((16, 16))).tobytes() for name in CLASSES}
    assert len(drawings) == 80


def test_a_missing_drawing_is_named(monkeypatch):
    monkeypatch.setitem(OPENMOJI, "cat", "10FFFF")
    with pytest.raises(InvalidInput, match=r"no drawing of 'cat': .*10FFFF\.svg is missing"):
        master.__wrapped__("cat")


# A fork and a small toothbrush are little but their black outline.
BROAD = [name for name in CLASSES if name not in ("fork", "toothbrush")]


@pytest.mark.parametrize("size, classes", [(14, load_world("icons32").classes), (24, BROAD), (42, BROAD)])
def test_tinted_icons_are_seen_in_their_color(size: int, classes: tuple[str, ...]):
    names = list(COLORS)
    palette = lab(np.array([COLORS[name] for name in names]))
    for cls in classes:
        for color in names:
            icon = sprite(cls, color, size, 0)
            opacity = 1 - icon.transparency[..., 0]
            pixels = icon.paint[opacity > 0.7] / opacity[opacity > 0.7][:, None]
            # The lighter half: at this size most other pixels of a thin icon are mixed with its black outline.
            light = pixels[pixels.sum(1) >= np.median(pixels.sum(1))]
            nearest = names[np.linalg.norm(lab(np.median(light, 0)) - palette, axis=-1).argmin()]
            assert nearest == color, (cls, color, nearest)


@pytest.mark.parametrize("color", COLORS)
def test_the_tint_maps_the_median_luminance_to_the_color(color: str):
    luma = np.array([0.299, 0.587, 0.114])
    for cls in CLASSES:
        drawing, result = (np.asarray(image, float) for image in (master(cls), tinted(master(cls), COLORS[color])))
        assert (drawing[..., 3] == result[..., 3]).all()
        shade = drawing[..., :3] @ luma
        painted = (drawing[..., 3] > 128) & (shade > 25)
        middle = np.median(shade[painted])
        if not 0.2 * 255 <= middle <= 0.9 * 255:
            continue
        at_middle = result[painted & (np.abs(shade - middle) < 2)][:, :3]
        assert np.abs(at_middle - COLORS[color]).max() < 4, cls
        # The drawing still shows: what was darker stays darker.
        darker = result[painted & (shade < 0.8 * middle)][:, :3]
        assert not len(darker) or darker.sum(1).mean() < 0.9 * sum(COLORS[color]), cls


def test_icons_stand_out_from_their_background(small: World):
    for scene in small.describe(0, 500, "all"):
        for icon in scene.objects:
            contrast = np.linalg.norm(lab(np.array(scene.background)) - lab(np.array(body(icon.cls, icon.color))))
            assert contrast >= MIN_CONTRAST, scene.caption
    gradients = np.array([scene.gradient for scene in small.describe(0, 500)])
    assert np.linalg.norm(gradients, axis=1).std() > 0.02
