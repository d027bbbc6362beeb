"""The rules against a table worked out by hand, and standard errors against simulated repeats."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fluidscale.evaluate.geneval import grouped, judge_images, repeated, summarise
from fluidscale.evaluate.protocol import Detection
from fluidscale.evaluate.rules import Verdict, check_prompts, judge
from fluidscale.spec import InvalidInput
from fluidscale.world.captions import TAGS

CASES = json.loads((Path(__file__).parent / "golden" / "geneval_cases.json").read_text())["cases"]
CLASSES, COLORS = ("cat", "dog", "cup"), ("red", "blue")


def detections(case):
    return [Detection(d[0], d[1], (d[2], d[3], d[4], d[5]), d[6]) for d in case["detections"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_verdict_of_the_protocol(case):
    verdict = judge(detections(case), case)
    assert verdict.correct is case["correct"], f"{case['why']}; judged: {verdict.reason}"
    assert bool(verdict.reason) is not case["correct"]


def test_the_table_is_large_and_covers_every_tag():
    assert len({case["name"] for case in CASES}) == len(CASES) >= 60
    for tag in TAGS:
        assert {case["correct"] for case in CASES if case["tag"] == tag} == {True, False}


def test_colors_may_come_from_another_model_and_only_where_asked():
    asked = []

    def color_of(detection):
        asked.append(detection)
        return "blue"

    prompt = {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "blue"}, {"class": "dog", "count": 1}],
    }
    seen = [Detection(cls, 0.9, (0, 0, 9, 9), "red") for cls in ("cat", "dog")]
    assert judge(seen, prompt, color_of).correct
    assert [d.cls for d in asked] == ["cat"]


def test_a_reason_says_what_was_found():
    prompt = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "blue"}]}
    assert judge([Detection("cat", 0.9, (0, 0, 9, 9), "red")], prompt).reason == "expected blue cat>=1, found 0; 1 red"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "shapes"}, "unknown tag 'shapes'"),
        ({"include": []}, "at least one clause"),
        ({"include": [{"class": "cow", "count": 1}]}, "does not know 'cow'"),
        ({"include": [{"class": "cat", "count": 0}]}, "whole number from 1"),
        ({"include": [{"class": "cat", "count": 1, "color": "pink"}]}, "unknown color 'pink'"),
        ({"include": [{"class": "cat", "count": 1, "size": "big"}]}, "unknown key 'size'"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "an earlier clause"),
        (
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}]},
            "unknown relation 'near'",
        ),
        ({"exclude": [{"class": "cat", "count": 2, "color": "red"}]}, "unknown key 'color'"),
        ({"tag": ["colors"]}, "unknown tag"),
        ({"prompt": ["a red cat"]}, "needs a text under 'prompt'"),
        ({"include": "cat"}, "include: expected a list of clauses, got 'cat'"),
        ({"include": ["cat"]}, r"include\[0\]: expected keys and values, got 'cat'"),
        ({"exclude": None}, "exclude: expected a list of clauses, got None"),
        ({"include": [{"class": ["cat"], "count": 1}]}, r"include\[0\]: the detector does not know \['cat'\]"),
        ({"include": [{"class": "cat", "count": True}]}, "whole number from 1, got True"),
        ({"include": [{"class": "cat", "count": 1, "color": ["red"]}]}, "unknown color"),
        *(
            ({"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": position}]}, message)
            for position, message in (
                (["left of"], r"include\[1\]: position must be \[relation, number of an earlier clause\]"),
                (3, r"include\[1\]: position must be \[relation, number of an earlier clause\], got 3"),
                ([["left of"], 0], "unknown relation"),
                (["left of", "0"], "an earlier clause, got '0'"),
            )
        ),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_refused(change, message):
    prompt = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"}
    check_prompts([prompt], CLASSES, COLORS)
    with pytest.raises(InvalidInput, match=message):
        check_prompts([prompt, prompt | change], CLASSES, COLORS)


def test_overall_is_the_unweighted_mean_of_the_tags():
    correct = [np.array([1, 1, 0, 0], bool)] * 10 + [np.array([1, 1, 1, 1], bool)] * 2
    summary = summarise(correct, ["colors"] * 10 + ["counting"] * 2)
    assert summary.overall.value == 0.75
    assert summary.overall.images == 48 and summary.tags["colors"].prompts == 10
    assert summary.tags["colors"].se == 0.0
    # Ten prompts, sample variance 1/3 within each: sqrt(1/3 / 40).
    assert summary.tags["colors"].se_seed == pytest.approx(math.sqrt(1 / 120))
    assert summary.overall.se_seed == pytest.approx(math.sqrt(1 / 120) / 2)


def test_one_image_a_prompt_has_no_seed_error():
    summary = summarise([np.array([True]), np.array([False])], ["colors", "colors"])
    assert math.isnan(summary.overall.se_seed) and summary.overall.se == pytest.approx(0.5)


def test_missing_images_are_refused():
    with pytest.raises(ValueError, match="same number of images"):
        summarise([np.ones(4, bool), np.ones(3, bool)], ["colors", "colors"])


def test_images_of_one_prompt_are_one_group():
    prompts = [{"tag": "colors", "prompt": p} for p in ("a", "a", "b", "b")]
    summary = grouped([Verdict(c, "", {}) for c in (True, True, False, False)], prompts)
    assert summary.overall.prompts == 2
    assert summary.overall.se == pytest.approx(0.5) and summary.overall.se_seed == 0.0


def test_few_prompts_are_asked_more_often():
    prompts = [{"tag": "single_object", "prompt": str(k)} for k in range(8)]
    prompts += [{"tag": "position", "prompt": str(k)} for k in range(100)]
    tags = [prompt["tag"] for prompt in repeated(prompts, 2)]
    assert tags.count("single_object") == 8 * 2 * 10 and tags.count("position") == 200


@pytest.mark.parametrize("which", ["se", "se_seed"])
def test_stated_intervals_cover(which):
    """The official design (553 prompts x 4), within-prompt correlation .4, known rates: 95 % means 95 %."""
    rng = np.random.default_rng(0)
    prompts = dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    rates = dict(zip(TAGS, (0.97, 0.75, 0.45, 0.80, 0.15, 0.40), strict=True))
    spread = (1 - 0.4) / 0.4  # of a beta distribution whose draws correlate by .4 within a prompt
    tags = [tag for tag, n in prompts.items() for _ in range(n)]
    means = np.array([rates[tag] for tag in tags])

    def true_value(p):
        return np.mean([p[[t == tag for t in tags]].mean() for tag in TAGS])

    fixed = rng.beta(means * spread, (1 - means) * spread)
    expected = true_value(means if which == "se" else fixed)
    repeats, covered = 2000, 0
    for _ in range(repeats):
        p = rng.beta(means * spread, (1 - means) * spread) if which == "se" else fixed
        overall = summarise(list(rng.random((len(p), 4)) < p[:, None]), tags).overall
        covered += abs(overall.value - expected) < 1.96 * getattr(overall, which)
    assert 0.93 <= covered / repeats <= 0.97


class OneCat:
    """A detector that sees a red cat in a bright image: the scorer needs no more of one than this interface."""

    name, sha256, classes, colors = "one-cat", "0" * 64, CLASSES, COLORS

    def detect(self, images):
        return [[Detection("cat", 0.99, (0, 0, 4, 4), "red")] if image.mean() > 100 else [] for image in images]


def test_any_detector_is_judged_by_the_same_rules():
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (200, 10)])
    prompts = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}] * 2
    assert [v.correct for v in judge_images(images, prompts, OneCat())] == [True, False]
