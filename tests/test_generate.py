"""Images are drawn once, resumed image by image, and refused when they are not what they should be."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluidscale.data.sources import open_source
from fluidscale.evaluate import Subject, evaluate, fid, generate, geneval
from fluidscale.evaluate.__main__ import main as command
from fluidscale.evaluate.agreement import agreement
from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.extract import features_of
from fluidscale.evaluate.features import load_features
from fluidscale.evaluate.fid import FrechetDistance, reference_features, scene_captions
from fluidscale.evaluate.generate import draw, image_seed
from fluidscale.evaluate.geneval import GenEval
from fluidscale.evaluate.grid import contact_sheet
from fluidscale.evaluate.guidance import sweep
from fluidscale.evaluate.protocol import Detection, Metric, Score
from fluidscale.evaluate.references import references
from fluidscale.evaluate.rules import Verdict
from fluidscale.evaluate.samples import Samples, read_samples
from fluidscale.evaluate.suite import EVALUATORS
from fluidscale.model.build import build
from fluidscale.record import Placement
from fluidscale.spec import InvalidInput, to_json
from fluidscale.world import World

PROMPTS = [{"prompt": f"a photo of a {color} {cls}"} for color in ("red", "blue") for cls in ("apple", "cup", "car")]


@pytest.fixture(autouse=True)
def small_reference(monkeypatch):
    """512 real scenes instead of 4096: the same code in an eighth of the time."""
    monkeypatch.setattr(fid, "LEAST_REFERENCE", 512)


@pytest.fixture
def subject(tiny_spec, tmp_path):
    spec = tiny_spec("discrete-raster")
    evaluation = dataclasses.replace(spec.evaluate, geneval_images_per_prompt=1, fd_images=64)
    spec = dataclasses.replace(spec, evaluate=evaluation)
    torch.manual_seed(0)
    network = build(spec.model).eval()
    run_dir = tmp_path / "runs" / "one"
    return Subject(network, spec, open_source(spec, Placement(), run_dir.parent), run_dir, torch.device("cpu"))


class FewPrompts(World):
    """The world, asking two prompts a tag: enough for the plumbing."""

    def prompts(self, split, limit=None, part="evaluation"):
        tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
        return super().prompts(split, dict.fromkeys(tags, 2), part)


def count_drawn(monkeypatch) -> list[int]:
    """Sizes of the batches that the model is really asked for."""
    drawn, original = [], generate.generate

    def spy(model, text, sampling, seeds, *rest, **options):
        drawn.append(len(seeds))
        return original(model, text, sampling, seeds, *rest, **options)

    monkeypatch.setattr(generate, "generate", spy)
    return drawn


def test_a_second_drawing_costs_nothing(subject, monkeypatch):
    drawn = count_drawn(monkeypatch)
    first, again = draw(subject, "few", PROMPTS), draw(subject, "few", PROMPTS)
    assert drawn == [6]
    assert np.array_equal(first.images(), again.images()) and first.images().shape == (6, 32, 32, 3)
    lines = [json.loads(line) for line in (first.folder / "prompts.jsonl").read_text().splitlines()]
    assert lines == list(first.rows) and {"file", "seed", "prompt"} <= set(lines[0])


def test_an_interrupted_drawing_continues_to_the_same_images(subject, monkeypatch):
    whole = draw(subject, "few", PROMPTS)
    expected = whole.images()
    for k in (1, 4):
        (whole.folder / whole.rows[k]["file"]).unlink()
    drawn = count_drawn(monkeypatch)
    assert np.array_equal(draw(subject, "few", PROMPTS).images(), expected)
    assert drawn == [2]


def test_two_processes_that_draw_one_image_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, image, save, saved = tmp_path / "000000.png", np.full((8, 8, 3), 7, np.uint8), Image.Image.save, []

    def save_with_company(self, to, **options):
        save(self, to, **options)
        saved.append(to)
        if len(saved) == 1:
            with monkeypatch.context() as another:
                another.setattr("os.getpid", lambda: 7)
                generate._write_image(path, image)

    monkeypatch.setattr(Image.Image, "save", save_with_company)
    generate._write_image(path, image)
    assert np.array_equal(np.asarray(Image.open(path)), image) and len(saved) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_repeated_prompts_have_seeds_of_their_own(subject):
    samples = draw(subject, "twice", [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    assert len({row["seed"] for row in samples.rows}) == 3
    assert samples.rows[1]["seed"] == image_seed(PROMPTS[0]["prompt"], 1)


def test_other_weights_prompts_or_sampling_have_a_folder_of_their_own(subject):
    torch.manual_seed(1)
    other = dataclasses.replace(subject, model=build(subject.spec.model).eval())
    sampling = dataclasses.replace(subject.spec.evaluate.sampling, guidance_scale=1.5)
    evaluation = dataclasses.replace(subject.spec.evaluate, sampling=sampling)
    guided = dataclasses.replace(subject, spec=dataclasses.replace(subject.spec, evaluate=evaluation))
    one = PROMPTS[:1]
    folders = {draw(s, "one", one).folder for s in (subject, other, guided)} | {
        draw(subject, "one", PROMPTS[1:2]).folder
    }
    assert len(folders) == 4


def test_missing_damaged_and_foreign_images_are_refused(subject):
    samples = draw(subject, "few", PROMPTS)
    path = samples.folder / samples.rows[2]["file"]
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(InvalidInput, match=r"1 of 6 images are missing, first 000002\.png"):
        samples.images()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=r"000002\.png: not a readable PNG"):
        samples.images()
    Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(InvalidInput, match=r"000002\.png: \(16, 16\), the others \(32, 32\)"):
        samples.images()


def test_a_word_the_world_lacks_is_refused_before_drawing(subject, monkeypatch):
    drawn = count_drawn(monkeypatch)
    with pytest.raises(InvalidInput, match="unicorn"):
        draw(subject, "bad", [{"prompt": "a red unicorn"}])
    assert drawn == []


def test_the_contact_sheet_holds_every_picture_unchanged():
    images = [np.full((32, 32, 3), 10 * k, np.uint8) for k in range(8)]
    sheet = np.asarray(
        Image.open(io.BytesIO(contact_sheet(images, ["a very long caption of many words"] * 8, columns=4)))
    )
    for k in range(8):
        assert (sheet == 10 * k).all(axis=2).sum() >= 160 * 160
    assert sheet.shape[1] > sheet.shape[0]


@pytest.mark.parametrize("asked", [True, False])
def test_what_a_lighter_evaluation_leaves_out_is_neither_drawn_nor_scored(subject, asked):
    images = {"geneval_unseen": asked, "stepwise_images": 8 if asked else 0}
    spec = dataclasses.replace(subject.spec, evaluate=dataclasses.replace(subject.spec.evaluate, **images))
    random = dataclasses.replace(spec, model=dataclasses.replace(spec.model, order="random", mask_law="uniform"))
    stepwise = {"val_nll_raster_order", "val_nll_k_steps"}
    assert stepwise & {one.name for one in EVALUATORS if one.wanted(random)} == (stepwise if asked else set())
    source = dataclasses.replace(subject.source, world=FewPrompts(spec.data.world))
    subject = dataclasses.replace(subject, source=source, spec=spec)
    names = {score.metric.name for score in evaluate(subject, ["geneval"])}
    assert ("geneval_unseen" in names) == asked and "geneval" in names
    assert [path.name.split("-")[0] for path in sorted(subject.samples_dir.iterdir()) if path.is_dir()] == (
        ["seen", "unseen"] if asked else ["seen"]
    )


def test_one_detector_looks_at_a_drawing_once(subject, monkeypatch):
    source = dataclasses.replace(subject.source, world=FewPrompts(subject.spec.data.world))
    subject, looked = dataclasses.replace(subject, source=source), []
    judge = geneval.judge_images
    monkeypatch.setattr(geneval, "judge_images", lambda *given: looked.append(given[2].name) or judge(*given))
    scores = {score.metric.name: score for score in evaluate(subject, ["geneval", "detector_agreement"])}
    first, second = "icons32-detector", "icons32-detector2"
    assert sorted(looked) == [first, first, second]  # seen and unseen, and seen again by the other
    assert scores["detector_agreement"].extra["scores"][0] == scores["geneval"].value


def test_geneval_and_distance_of_a_fresh_model(subject):
    """The whole chain on the shipped judges: an untrained model is scored, badly, and every file is there."""
    source = dataclasses.replace(subject.source, world=FewPrompts(subject.spec.data.world))
    subject = dataclasses.replace(subject, source=source)
    scores = {score.metric.name: score for score in evaluate(subject, ["geneval", "fd"])}
    assert {"geneval", "geneval_unseen", "geneval_counting", "fd", "kid", "precision", "recall"} <= set(scores)
    assert scores["geneval"].value < 0.2 and scores["geneval"].extra["prompts"] == 12
    assert scores["fd"].value > 5 * scores["fd"].se > 0 and scores["fd"].metric.unit == "FD-icons32"
    results = list((subject.run_dir / "samples").glob("seen-*/results.jsonl"))
    line = json.loads(results[0].read_text().splitlines()[0])
    assert list(line) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(line["metadata"])["include"] and isinstance(json.loads(line["details"]), dict)
    assert (subject.run_dir / "samples" / "grid.png").exists()


def test_two_detectors_are_compared_on_the_images_already_drawn(subject, monkeypatch):
    source = dataclasses.replace(subject.source, world=FewPrompts(subject.spec.data.world))
    subject = dataclasses.replace(subject, source=source)
    list(evaluate(subject, ["geneval"]))
    drawn = count_drawn(monkeypatch)
    (score,) = evaluate(subject, ["detector_agreement"])
    assert drawn == [] and score.metric.name == "detector_agreement"
    # An untrained model's images are wrong to both: agreement is high, and kappa says that this is worth nothing.
    assert score.value > 0.8 and 0 <= score.extra["same_objects"] <= 1
    assert len(set(score.extra["detectors_sha256"])) == 2
    assert score.extra["kappa"] is None or score.extra["kappa"] <= 1


def test_agreement_counts_verdicts_and_takes_chance_out():
    rows = tuple({"tag": "colors", "prompt": str(k // 2)} for k in range(8))
    first = [Verdict(k < 4, "", {}) for k in range(8)]
    second = [Verdict(k < 4 or k == 7, "", {"cat": [Detection("cat", 0.9, (0, 0, 1, 1))]}) for k in range(8)]
    score = agreement(Samples(Path(), rows), [first, second], "p", ["a", "b"])
    assert score.value == 7 / 8 and score.extra["scores"] == [0.5, 5 / 8]
    assert score.extra["kappa"] == pytest.approx((7 / 8 - 0.5) / 0.5)
    assert (score.extra["only_first_right"], score.extra["only_second_right"]) == (0, 1)
    assert score.extra["same_objects"] == 0.0
    same = agreement(Samples(Path(), rows), [first, first], "p", ["a", "b"])
    assert same.value == same.extra["kappa"] == same.extra["same_objects"] == 1.0 and same.se == 0.0


def test_reference_features_are_shared_and_checked(subject):
    features = load_features(subject.features_name)
    first = reference_features(subject, features)
    (path,) = subject.cache_dir.glob("reference-*.npy")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidInput, match="damaged features"):
        reference_features(subject, features)
    path.unlink()
    assert np.array_equal(reference_features(subject, features), first)


def test_protocols_name_guidance_and_judges(subject):
    for evaluator in (GenEval(), FrechetDistance()):
        assert "icons32" in evaluator.protocol(subject) and "-g2-" in evaluator.protocol(subject)


def test_captions_are_sentences_of_real_scenes(subject):
    captions = [p["prompt"] for p in scene_captions(subject.world, 32)]
    assert len(set(captions)) > 10 and all(subject.world.encode(c).any() for c in captions)


def test_references_bracket_what_a_model_can_reach(subject):
    world = FewPrompts(subject.spec.data.world)
    parts = (subject.tokenizer, load_detector(subject.detector_name), load_features(subject.features_name))
    found = references(world, *parts, fd_images=128)
    error = math.hypot(found["fd_real_floor_se"], found["fd_floor_se"])
    assert 0 < found["fd_real_floor"] < found["fd_floor"] + 3 * error
    assert found["geneval_floor"] < found["geneval_ceiling"] <= found["geneval_real"]


def test_the_command_measures_a_folder_and_its_variants(subject, capsys):
    run_dir = subject.run_dir
    (run_dir / "ckpt").mkdir(parents=True)
    (run_dir / "spec.json").write_text(to_json(subject.spec))
    save_file(subject.model.state_dict(), run_dir / "ckpt" / "ema.safetensors")
    assert command([str(run_dir), "--metrics", "val_loss", "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)
    assert (score["name"], score["variant"], score["n"]) == ("val_loss", "", subject.spec.evaluate.val_images)
    assert command([str(run_dir), "--metrics", "fd", "--guidance-scale", "1", "2"]) == 0
    shown = capsys.readouterr().out
    assert "guidance_scale=1 fd " in shown and "FD-icons32" in shown
    assert {p.name for p in (run_dir / "eval").iterdir()} >= {"guidance_scale=1", "fd.json", "val_loss.json"}


@pytest.fixture
def run_dir(subject):
    """The subject as a trained run's folder; a fresh model draws the same whatever the guidance."""
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    (subject.run_dir / "ckpt").mkdir(parents=True)
    (subject.run_dir / "spec.json").write_text(to_json(subject.spec))
    save_file(subject.model.state_dict(), subject.run_dir / "ckpt" / "ema.safetensors")
    return subject.run_dir


def test_a_prompt_file_is_drawn_as_it_is_at_several_scales(run_dir, tmp_path, capsys, monkeypatch):
    lines = [{"prompt": "a photo of a red apple", "tag": "colors", "note": 7}, {"prompt": "a photo of a cup"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command_line = [str(run_dir), "--prompts", str(tmp_path / "prompts.jsonl"), "--images-per-prompt", "3"]
    drawn = count_drawn(monkeypatch)
    assert command([*command_line, "--guidance-scale", "2,1"]) == 0
    folders = [read_samples(Path(line)) for line in capsys.readouterr().out.split()]
    assert drawn == [6, 6] and folders[0].sha256 != folders[1].sha256
    rows = folders[0].rows
    assert [row["index"] for row in rows] == [0, 0, 0, 1, 1, 1] and rows[0]["note"] == 7
    assert len({row["seed"] for row in rows}) == 6
    drawing = [json.loads((samples.folder / "drawing.json").read_text()) for samples in folders]
    assert [one["sampling"]["guidance_scale"] for one in drawing] == [2, 1]
    assert command(command_line) == 0 and drawn == [6, 6]


def outside(samples, **changed):
    score = {"metric": "fid", "unit": "FID", "higher_is_better": False, "value": 7.5, "se": 0.1, "n": 6}
    return {"scores": [score | {"protocol": "p", "images_sha256": samples.sha256} | changed]}


def test_an_outside_judges_scores_join_the_runs(run_dir, subject, tmp_path, capsys):
    own, path = draw(subject, "few", PROMPTS), tmp_path / "scores.json"
    sampling = dataclasses.replace(subject.spec.evaluate.sampling, guidance_scale=1.0)
    evaluation = dataclasses.replace(subject.spec.evaluate, sampling=sampling)
    spec = dataclasses.replace(subject.spec, evaluate=evaluation)
    other = draw(dataclasses.replace(subject, spec=spec, variant="guidance_scale=1"), "few", PROMPTS)
    for samples, place in ((own, "fid.json"), (other, "guidance_scale=1/fid.json")):
        path.write_text(json.dumps(outside(samples)))
        assert command([str(run_dir), "--merge", str(path)]) == 0
        kept = json.loads((run_dir / "eval" / place).read_text())
        assert kept["value"] == 7.5 and kept["weights"] == subject.weights_sha256
    capsys.readouterr()
    for changed, message in (
        ({"images_sha256": "0" * 64}, "not of this run's"),
        ({"protocol": "q"}, "two protocols"),
        ({"value": "7.5"}, "has value '7.5'"),
        ({"metric": "../x"}, "not a metric's name"),
    ):
        path.write_text(json.dumps(outside(own, **changed)))
        assert command([str(run_dir), "--merge", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert json.loads((run_dir / "eval" / "fid.json").read_text())["protocol"] == "p"


def test_of_several_guidance_scales_the_best_and_the_runs_own_are_named(run_dir, capsys):
    assert command([str(run_dir), "--metrics", "fd", "--guidance-scale", "1,2"]) == 0
    assert "fd: best" in capsys.readouterr().err
    content = json.loads((run_dir / "eval" / "guidance" / "sweep.json").read_text())
    fd = content["metrics"]["fd"]
    assert content["own_guidance_scale"] == 2 and [one["guidance_scale"] for one in fd["scales"]] == [1, 2]
    assert fd["fixed"]["value"] == json.loads((run_dir / "eval" / "fd.json").read_text())["value"]
    assert fd["best"]["value"] == min(one["value"] for one in fd["scales"])


def test_the_better_of_two_depends_on_the_metric():
    def scores(value):
        kinds = (("fd", False), ("geneval", True))
        return [Score(Metric(name, "", higher), value, 0.1, 9, "p") for name, higher in kinds]

    found = sweep(3.0, {1.0: scores(0.4), 2.0: scores(0.6)})
    assert found["fd"]["best"]["guidance_scale"] == 1.0 and found["geneval"]["best"]["guidance_scale"] == 2.0
    assert found["fd"]["fixed"] is None


def test_features_are_kept_by_content(subject, monkeypatch):
    network = load_features(subject.features_name)
    samples, seen = draw(subject, "few", PROMPTS), []

    class Counting:
        name, sha256, width = network.name, network.sha256, network.width

        def __call__(self, images):
            seen.append(len(images))
            return network(images)

    first = features_of(samples, Counting(), subject.cache_dir)
    moved = samples.folder.rename(samples.folder.with_name("elsewhere"))
    assert np.array_equal(features_of(read_samples(moved), Counting(), subject.cache_dir), first) and seen == [6]
    path = moved / samples.rows[0]["file"]
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert not np.array_equal(features_of(read_samples(moved), Counting(), subject.cache_dir), first) and seen == [6, 6]


@pytest.mark.parametrize("asked", [["--metrics", "height"], []])
def test_the_command_refuses_in_one_line(tmp_path, subject, capsys, asked):
    assert command([str(tmp_path / "nowhere"), *asked]) == 2
    assert capsys.readouterr().err.count("\n") == 1
