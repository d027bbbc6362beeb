"""What collecting keeps of a run's pictures: results a prompt, one protocol for all numbers of images, one prompt."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import curves
from analysis.images import beside
from analysis.table import InvalidTable
from fluidscale.record import write_json
from fluidscale.sweep import load_sweep
from slurm.drawn import answers, protocols_any_n, write_one_prompt, write_per_prompt
from slurm.trained import curve, write_per_step
from slurm.validated import per_image, write_per_image

SPEC = load_sweep("smoke").runs[0]


def evaluated(run: Path, images: int, right: int, folder: str = "seen-1", detector: str = "d1") -> dict[str, float]:
    """A run's folder as evaluation leaves it: `right` of each prompt's images are; returns its record."""
    place = run / "samples" / folder
    place.mkdir(parents=True)
    lines = []
    for k, (tag, text) in enumerate((("counting", "three cats"), ("two_object", "a cat and a dog"),
                                     ("two_object", "a bus and a car"))):  # fmt: skip
        for i in range(images):
            name = f"{k * images + i:06d}.png"
            Image.fromarray(np.full((8, 8, 3), 40 * k + i, np.uint8)).save(place / name)
            lines.append({"filename": name, "tag": tag, "prompt": text, "correct": i < right and k != 2})
    (place / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(run / "eval" / "geneval.json", {"metric": "geneval", "extra": {"detector_sha256": detector}})
    share = right / images
    return {"geneval": (share + share / 2) / 2}


def test_results_are_kept_prompt_by_prompt(tmp_path: Path) -> None:
    record = evaluated(tmp_path / "a", 4, 3)
    found = answers(tmp_path / "a", record)
    write_per_prompt(tmp_path / "per_prompt.parquet", {"a": found})
    frame = pd.read_parquet(tmp_path / "per_prompt.parquet")
    assert list(frame.columns) == ["run_id", "metric", "tag", "prompt", "mean", "n"]
    assert dict(zip(frame["prompt"], frame["mean"], strict=True)) == {
        "three cats": 0.75, "a cat and a dog": 0.75, "a bus and a car": 0.0,
    }  # fmt: skip
    assert set(frame["n"]) == {4} and frame.groupby("tag")["mean"].mean().mean() == record["geneval"]
    write_per_prompt(tmp_path / "per_prompt.parquet", {"a": {}})
    assert not (tmp_path / "per_prompt.parquet").exists(), "results of runs that are gone must not stay"


def test_only_results_that_give_the_recorded_score_count(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", 4, 1, "seen-old")
    record = evaluated(tmp_path / "a", 4, 3, "seen-new")
    found = answers(tmp_path / "a", record)["geneval"]
    assert found[0].mean == 0.75 and found[0].files[0].parent.name == "seen-new"
    assert answers(tmp_path / "a", {"geneval": 0.123}) == {} and answers(tmp_path / "a", {}) == {}


def test_geneval_s_own_file_is_collected_too_and_may_pose_a_text_twice(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", 4, 3, "geneval-1")
    results = tmp_path / "a" / "samples" / "geneval-1" / "results.jsonl"
    results.write_text(results.read_text().replace("a bus and a car", "a cat and a dog"))
    found = answers(tmp_path / "a", {"geneval": (0.75 + 0.375) / 2})["geneval"]
    assert [(a.tag, len(a.right), a.mean) for a in found] == [("counting", 4, 0.75), ("two_object", 8, 0.375)]
    names = [protocols_any_n(SPEC, tmp_path / "a", {"geneval": found})["geneval_protocol_any_n"]]
    write_json(tmp_path / "a" / "eval" / "geneval.json", {"extra": {"detector_sha256": "d1", "clip_sha256": "c1"}})
    names += [protocols_any_n(SPEC, tmp_path / "a", {"geneval": found})["geneval_protocol_any_n"]]
    assert names[0] != names[1]


def test_the_number_of_images_does_not_change_the_protocol_and_the_judge_does(tmp_path: Path) -> None:
    names = {}
    for run, images, detector in (("one", 1, "d1"), ("four", 4, "d1"), ("other", 4, "d2")):
        record = evaluated(tmp_path / run, images, 1, detector=detector)
        found = answers(tmp_path / run, record)
        names[run] = protocols_any_n(SPEC, tmp_path / run, found)
    assert set(names["one"]) == {f"geneval{tag}_protocol_any_n" for tag in ("", "_counting", "_two_object")}
    assert names["one"] == names["four"] != names["other"]
    sampling = dataclasses.replace(SPEC.evaluate.sampling, guidance_scale=7.0)
    guided = dataclasses.replace(SPEC, evaluate=dataclasses.replace(SPEC.evaluate, sampling=sampling))
    record = evaluated(tmp_path / "guided", 4, 1)
    assert protocols_any_n(guided, tmp_path / "guided", answers(tmp_path / "guided", record)) != names["four"]
    assert protocols_any_n(SPEC, tmp_path / "guided", {}) == {}
    # The paper's arms have each a guidance of their own, and are compared.
    published = [dataclasses.replace(spec, data=dataclasses.replace(spec.data, world=None)) for spec in (SPEC, guided)]
    asked = answers(tmp_path / "guided", record)
    names = [protocols_any_n(spec, tmp_path / "guided", asked) for spec in published]
    assert names[0] == names[1]


def test_a_lighter_evaluation_without_held_out_prompts_keeps_the_scores_protocol(tmp_path: Path) -> None:
    record = evaluated(tmp_path / "a", 4, 1)
    light = answers(tmp_path / "a", record)
    full = {**light, "geneval_unseen": light["geneval"][:1]}
    names = protocols_any_n(SPEC, tmp_path / "a", full)
    assert names.pop("geneval_unseen_protocol_any_n") not in names.values()
    assert names == protocols_any_n(SPEC, tmp_path / "a", light)


def test_one_prompt_that_all_were_asked_is_shown(tmp_path: Path) -> None:
    found = {name: answers(tmp_path / name, evaluated(tmp_path / name, 4, right))["geneval"]
             for name, right in (("a", 1), ("b", 3))}  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.png").write_bytes(b"")
    write_one_prompt(tmp_path / "out", found)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "prompt.txt"]
    assert (tmp_path / "out" / "prompt.txt").read_text() == "a bus and a car\n"
    picture = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert picture.shape == (8, 32, 3) and list(picture[0, ::8, 0]) == [80, 81, 82, 83]


@pytest.mark.parametrize("shown", [{}, {"a": []}])
def test_without_pictures_nothing_is_shown(tmp_path: Path, shown: dict) -> None:
    write_one_prompt(tmp_path / "out", shown)
    assert not (tmp_path / "out").exists()


def test_losses_are_kept_image_by_image(tmp_path: Path) -> None:
    values = [1.25, 2.5, 3.0]
    for name, extra in (("val_loss", {"per_image": values}), ("val_nll", {"per_image": [1.0, None]})):
        write_json(tmp_path / "a" / "eval" / f"{name}.json", {"metric": name, "extra": extra})
    found = per_image(tmp_path / "a", {"val_loss": 2.25, "val_nll": 1.0})
    assert found == {"val_loss": values}, "a diverged image is no value"
    assert per_image(tmp_path / "a", {"val_loss": 2.26}) == {}, "values of other weights"
    assert per_image(tmp_path / "b", {"val_loss": 2.25}) == {}, "a run evaluated before values were kept"
    write_per_image(tmp_path / "per_image.parquet", [("a", found), ("b", {})])
    assert [list(v) for v in beside(tmp_path / "runs.csv").values()] == [values]
    write_per_image(tmp_path / "per_image.parquet", [("a", {})])
    assert not (tmp_path / "per_image.parquet").exists()


def test_a_learning_curve_is_kept_small_and_whole(tmp_path: Path) -> None:
    lines = [{"step": s, "images": 64 * s, "train_loss": 1 + s**-0.3} for s in range(25, 25_000, 25)]
    for name, of in (("a", lines), ("b", lines[:2])):
        (tmp_path / name).mkdir()
        text = "\n".join(map(json.dumps, [*of, {"step": 1, "val_loss": 2.0}, {"images": 64, "train_loss": None}]))
        (tmp_path / name / "metrics.jsonl").write_text(text + '\n{"torn')
    found = curve(tmp_path / "a")
    assert found is not None and curve(tmp_path / "b") is None and curve(tmp_path / "c") is None
    odd = ([{"images": 64, "train_loss": 1.0}] * 3, [{"images": i, "train_loss": 1} for i in (-1, "x", 2)])
    for k, bad in enumerate(odd):
        (tmp_path / f"odd-{k}").mkdir()
        (tmp_path / f"odd-{k}" / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*bad, 3])))
        assert curve(tmp_path / f"odd-{k}") is None
    images, losses = map(np.array, found)
    assert 40 < len(images) <= 80 and (np.diff(images) > 0).all()
    assert images[0] == lines[0]["images"] and images[-1] == pytest.approx(lines[-1]["images"], rel=0.1)
    assert losses == pytest.approx(1 + (images / 64) ** -0.3, rel=1e-3)
    table = tmp_path / "runs.csv"
    write_per_step(tmp_path / curves.FILE, [("a", found), ("b", None)])
    assert [tuple(map(list, v)) for v in curves.beside(table).values()] == [found]
    for torn in ("no parquet", pd.DataFrame([("a", [1.0], [1.0, 2.0])], columns=list(curves.COLUMNS))):
        (tmp_path / curves.FILE).write_text(torn) if isinstance(torn, str) else torn.to_parquet(tmp_path / curves.FILE)
        with pytest.raises(InvalidTable, match="UNREADABLE_CURVES"):
            curves.beside(table)
    write_per_step(tmp_path / curves.FILE, [("b", None)])
    assert curves.beside(table) == {} and not (tmp_path / curves.FILE).exists()
