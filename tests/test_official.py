"""GenEval on a folder of images: whole or refused, resumed after a kill, and the command that judges it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_judges import clip, dinov2, mask2former

from fluidscale.evaluate import posed
from fluidscale.evaluate.judges import mask2former as mask2former_module
from fluidscale.evaluate.judges import official
from fluidscale.evaluate.judges.__main__ import main as judge
from fluidscale.evaluate.judges.dinov2 import load_dinov2
from fluidscale.evaluate.judges.official import check_official, official_geneval
from fluidscale.evaluate.judges.pretrained import weights_sha256
from fluidscale.evaluate.judges.selftest import GOLDEN, features_golden, self_tested
from fluidscale.evaluate.protocol import Detection
from fluidscale.evaluate.samples import read_samples
from fluidscale.objects import CLASSES, COLORS
from fluidscale.spec import InvalidInput
from fluidscale.world.captions import TAGS
from fluidscale.world.prompts import PROTOCOL

FEW = dict.fromkeys(TAGS, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    mask2former().save_pretrained(root / "mask2former")
    return {"mask2former": root / "mask2former", "clip": clip(root / "clip"), "gelu": clip(root / "gelu", "gelu")}


class RedCat:
    """A detector that sees a cat in bright pictures and counts what it is asked."""

    name, sha256, classes, colors = "red-cat", "0" * 64, CLASSES, tuple(COLORS)

    def __init__(self) -> None:
        self.seen = 0

    def detect(self, images):
        self.seen += len(images)
        box = (0.0, 0.0, 4.0, 4.0)
        return [
            [Detection("cat", 0.99, box, mask=np.ones((8, 8), bool))] if image.mean() > 100 else [] for image in images
        ]


class Red:
    def color(self, image, detection):
        assert image.shape == (8, 8, 3) and detection.mask.all()
        return "red"


def official_folder(folder: Path, images_per_prompt: int, layout: str = "ours", counts=PROTOCOL) -> Path:
    """553 prompts in GenEval's numbers; odd images are bright."""
    folder.mkdir()
    rows, number = [], 0
    for tag, count in counts.items():
        for k in range(count):
            clause = {"class": "cat", "count": 1} | ({"color": "red"} if tag == "colors" else {})
            prompt = {"tag": tag, "include": [clause], "prompt": f"{tag} {k // 2 if tag == 'counting' else k}"}
            for image in range(images_per_prompt):
                name = f"{number:05d}/samples/{image:04d}.png" if layout == "official" else f"{len(rows):06d}.png"
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (200,) * 3 if image % 2 else (10,) * 3).save(path)
                rows.append({"file": name, "index": number, **prompt})
            if layout == "official":
                (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(prompt))
            number += 1
    if layout == "ours":
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("layout", ["ours", "official"])
def test_a_folder_is_scored_whole_and_only_once(tmp_path, layout):
    samples, detector = read_samples(official_folder(tmp_path / "images", 2, layout)), RedCat()
    scores = {score.metric.name: score for score in official_geneval(samples, detector, Red(), "c" * 64)}
    assert set(scores) == {"geneval", *(f"geneval_{tag}" for tag in TAGS)}
    assert all(score.value == 0.5 and score.n == 2 * PROTOCOL.get(name[8:], 553) for name, score in scores.items())
    extra = scores["geneval"].extra
    assert extra["detector_sha256"] == "0" * 64 and extra["clip_sha256"] == "c" * 64
    assert scores["geneval"].se == extra["se_bootstrap"] == 0.0 and extra["se_seed"] > 0
    assert scores["geneval"].protocol.startswith("geneval-official-x2-")
    lines = [json.loads(line) for line in (samples.folder / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 1106 == detector.seen
    assert list(lines[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    list(official_geneval(samples, detector, Red(), "c" * 64))
    assert detector.seen == 1106


def test_a_stopped_judgement_goes_on_where_it_was(tmp_path):
    class Stopping(RedCat):
        def detect(self, images):
            if self.seen >= 40:
                raise KeyboardInterrupt
            return super().detect(images)

    samples, detector = read_samples(official_folder(tmp_path / "images", 1)), Stopping()
    with pytest.raises(KeyboardInterrupt):
        list(official_geneval(samples, detector, Red(), "c"))
    (kept,) = samples.folder.glob("judging-*/*.jsonl")
    kept.write_text(kept.read_text() + '{"filename": "0000')  # torn by the kill
    again = RedCat()
    whole = list(official_geneval(samples, again, Red(), "c"))[-1]
    assert again.seen == 553 - 40 and whole.value == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"552 prompts, GenEval has 553 \(color_attr 99 of 100\)"),
        (lambda rows: rows + rows[:1], "prompts have \\[1, 2\\] images each"),
        (lambda rows: [{"file": row["file"], "prompt": row["prompt"]} for row in rows], "include is missing"),
        (lambda rows: [], "prompts is missing"),
    ],
)
def test_anything_but_553_prompts_is_refused(tmp_path, change, message):
    rows = list(read_samples(official_folder(tmp_path / "images", 1)).rows)
    check_official(rows)
    with pytest.raises(InvalidInput, match=message):
        check_official(change(rows))


@pytest.fixture
def few(monkeypatch, tmp_path) -> Path:
    """One prompt a tag: the same path through the real judges in a hundredth of the time."""
    monkeypatch.setattr(official, "PROTOCOL", FEW)
    monkeypatch.setattr(mask2former_module, "SHORT_SIDE", 96)
    return official_folder(tmp_path / "images", 1, counts=FEW)


def test_the_command_judges_with_real_formats_and_a_second_time_costs_nothing(folders, few, monkeypatch, capsys):
    folder = few
    arguments = [
        str(folder),
        "--detector",
        str(folders["mask2former"]),
        "--clip",
        str(folders["clip"]),
        "--device",
        "cpu",
    ]
    assert judge([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert [one["metric"] for one in json.loads(shown.out)][-1] == "geneval"
    assert f"detector {weights_sha256(folders['mask2former'])}" in shown.err and "clip " in shown.err
    kept = json.loads((folder / "scores.json").read_text())["scores"]
    assert len(kept) == 7 and {one["images_sha256"] for one in kept} == {read_samples(folder).sha256}
    assert (folders["mask2former"] / GOLDEN).exists() and (folders["clip"] / GOLDEN).exists()
    monkeypatch.setattr(posed, "judge_images", None)
    assert judge(arguments) == 0
    assert judge([str(folder), "--clip", str(folders["clip"]), "--device", "cpu"]) == 0
    kept = json.loads((folder / "scores.json").read_text())["scores"]
    assert [one["metric"] for one in kept][-1] == "clip_score" and len(kept) == 8


def test_a_judge_that_sees_something_else_than_before_is_refused(folders, few, capsys):
    folder = few
    golden = folders["clip"] / GOLDEN
    assert judge([str(folder), "--clip", str(folders["clip"]), "--device", "cpu"]) == 0
    kept = golden.read_text()
    content = json.loads(kept)
    content["values"][1][2] += 0.05
    golden.write_text(json.dumps(content))
    assert judge([str(folder), "--clip", str(folders["clip"]), "--device", "cpu"]) == 2
    assert "now differs by 0.05 from what it saw" in capsys.readouterr().err
    golden.write_text(kept)


def test_every_published_judge_is_tested_before_it_judges(folders, tmp_path):
    """Kept at first use by weights, compared afterwards; other weights are another judge."""
    path = tmp_path / "dinov2"
    dinov2(path)
    first = self_tested(load_dinov2, features_golden, path, "cpu")
    kept = json.loads((path / GOLDEN).read_text())
    assert kept["sha256"] == first.sha256 and np.shape(kept["values"]) == (3, 16)
    (path / GOLDEN).write_text(json.dumps(kept | {"values": [[0.0] * 16] * 3}))
    with pytest.raises(InvalidInput, match=r"golden\.json: on the fixed pictures this judge now differs"):
        self_tested(load_dinov2, features_golden, path, "cpu")
    (path / GOLDEN).write_text(json.dumps({"sha256": "0" * 64, "values": []}))
    self_tested(load_dinov2, features_golden, path, "cpu")
    assert json.loads((path / GOLDEN).read_text()) == kept


@pytest.mark.parametrize("fault", ["missing", "torn", "size", "gelu", "count", "alone", "empty", "nothing"])
def test_bad_input_is_one_line_and_exit_code_2(folders, few, tmp_path, monkeypatch, capsys, fault):
    folder = few
    if fault == "count":
        monkeypatch.setattr(official, "PROTOCOL", PROTOCOL)
    arguments = [
        "--detector",
        str(folders["mask2former"]),
        "--clip",
        str(folders["gelu" if fault == "gelu" else "clip"]),
    ]
    path = few / "000003.png"
    if fault == "missing":
        path.unlink()
    elif fault == "torn":
        path.write_bytes(path.read_bytes()[:40])
    elif fault == "size":
        Image.new("RGB", (9, 8)).save(path)
    elif fault == "alone":
        arguments = arguments[:2]
    elif fault == "nothing":
        arguments = []
    elif fault == "empty":
        folder = tmp_path
    messages = {"missing": "images are missing", "torn": "000003.png: not a readable PNG", "size": "000003.png: (8, 9)",
                "gelu": "quick_gelu", "count": "6 prompts, GenEval has 553", "alone": "--detector needs --clip",
                "empty": "no images to judge", "nothing": "nothing to measure"}  # fmt: skip
    capsys.readouterr()
    assert judge([str(folder), *arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert (
        messages[fault] in error
        and len([line for line in error.splitlines() if not line.startswith(("clip", "detector"))]) == 1
    )
