"""A run on real images whose own evaluation asks published judges: planned, in one process and in two, and refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import together
from real_formats import SWEEP, saved_stack
from test_coco import few_features
from test_official import FEW
from test_shard_runs import refused
from tiny_judges import clip, dinov2, mask2former

from fluidscale import published
from fluidscale.evaluate import generate
from fluidscale.evaluate.__main__ import main as evaluate
from fluidscale.evaluate.judges import mask2former as mask2former_module
from fluidscale.evaluate.judges import official
from fluidscale.evaluate.judges import scores as judge_scores
from fluidscale.evaluate.judges.coco import squared
from fluidscale.evaluate.judges.dinov2 import load_dinov2
from fluidscale.evaluate.judges.inception import Inception, load_inception
from fluidscale.evaluate.judges.reference import Reference, save_reference
from fluidscale.folder import RunFolder
from fluidscale.run import run
from fluidscale.sweep import load_sweep
from slurm import launch
from slurm.drawn import answers, protocols_any_n
from slurm.placement import load_profile, place

# Nine images over two processes: a sampler that pads would draw ten. The file has more.
CAPTIONS = 9
FILES = {
    "geneval_prompts": "geneval.jsonl",
    "detector": "mask2former",
    "clip": "clip",
    "fid_prompts": "captions.jsonl",
    "inception": "inception.pth",
    "inception_reference": "inception.npz",
    "dinov2": "dinov2",
    "dinov2_reference": "dinov2.npz",
}
COUNTS = f"geneval_images_per_prompt: 2, fd_images: {CAPTIONS}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """Encoded pictures, and every published judge in its real format with references of these pictures."""
    root = saved_stack(tmp_path_factory.mktemp("published"))
    mask2former().save_pretrained(root / "mask2former")
    clip(root / "clip"), clip(root / "gelu", "gelu"), dinov2(root / "dinov2")
    torch.manual_seed(0)
    torch.save(Inception().state_dict(), root / "inception.pth")
    real = np.stack([squared(Image.open(path), 32) for path in sorted((root / "images").iterdir())])
    for network in (load_inception(root / "inception.pth"), load_dinov2(root / "dinov2")):
        facts = {"side": 32, "n": len(real), "extractor": network.name, "extractor_sha256": network.sha256}
        save_reference(root / f"{network.name}.npz", Reference(network(real), facts))
    save_reference(root / "large.npz", Reference(np.zeros((4, 16)), facts | {"side": 256}))
    rows = [{"prompt": f"a {color} {thing}"} for color in ("red", "blue") for thing in ("cat", "dog", "house")] * 2
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"tag": tag, "include": [{"class": "cat", "count": 1}], "prompt": f"{tag} cat"} for tag in FEW]
    (root / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (root / "texts.txt").write_text("a red cat\n")
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same path as with 553 prompts, pictures of 800 px and 2048 features, at a size that a test can wait for."""
    monkeypatch.setattr(published, "GENEVAL_PROMPTS", len(FEW))
    monkeypatch.setattr(official, "PROTOCOL", FEW)
    monkeypatch.setattr(mask2former_module, "SHORT_SIDE", 96)
    monkeypatch.setattr(judge_scores, "distances", few_features)


@pytest.fixture
def drawn(monkeypatch, tmp_path) -> Path:
    """A folder where each process leaves the seeds of the images that it draws."""
    original = generate.generate

    def spy(model, text, sampling, seeds, *rest, **options):
        with open(tmp_path / f"drawn-{os.environ.get('RANK', '0')}", "a") as file:
            file.writelines(f"{seed}\n" for seed in seeds)
        return original(model, text, sampling, seeds, *rest, **options)

    monkeypatch.setattr(generate, "generate", spy)
    return tmp_path


def sweep(root: Path, files: dict[str, str], counts: str = COUNTS, name: str = "judged") -> Path:
    """The four arms on pictures, with judges."""
    listed = ", ".join(f"{key}: ROOT/{file}" for key, file in files.items())
    text = SWEEP.replace("geneval_images_per_prompt: 0, fd_images: 0", counts)
    path = root / f"{name}.yaml"
    path.write_text(f"judges: {{{listed}}}\n{text}".replace("ROOT", str(root)))
    return path


def planned(path: Path):
    found = load_sweep(str(path), arms=["discrete-raster"])
    return found.runs[0], place(found.runs[0], load_profile("cpu"), (), found.assets)


def test_a_runs_own_evaluation_asks_published_judges_in_one_process_and_in_two(stack, drawn, monkeypatch, capsys):
    spec, placement = planned(sweep(stack, FILES))
    assert spec.evaluate.judges == ("clip_score", "fd", "fid", "geneval")
    folder = drawn / "one" / spec.id
    alone = run(spec, folder, placement)
    seeds = Counter((drawn / "drawn-0").read_text().split())
    assert len(seeds) == seeds.total() == 2 * len(FEW) + CAPTIONS
    (drawn / "drawn-0").unlink()
    two = dataclasses.replace(placement, strategy="ddp", devices=2)
    records = together(2, run, spec, drawn / "two" / spec.id, two)
    shares = [(drawn / f"drawn-{rank}").read_text().split() for rank in (0, 1)]
    assert records[1] is None and Counter(shares[0] + shares[1]) == seeds and abs(len(shares[0]) - len(shares[1])) <= 2
    for metric in ("geneval", "geneval_counting", "fid", "kid", "precision", "fd", "clip_score", "val_loss"):
        assert records[0][f"{metric}_protocol"] == alone[f"{metric}_protocol"]
        assert np.isfinite(alone[metric]) and records[0][f"{metric}_n"] == alone[f"{metric}_n"]
    assert (alone["fd_unit"], alone["fid_unit"]) == ("FD-dinov2", "FID-inception")
    assert alone["geneval_protocol"].startswith("geneval-official-x2-")
    assert [alone[f"{metric}_n"] for metric in ("geneval", "fid", "fd", "clip_score")] == [12, *[CAPTIONS] * 3]
    # What collecting and the report read.
    found = answers(folder, alone)
    assert len(found["geneval"]) == len(FEW) and (folder / "samples" / "grid.png").exists()
    assert "geneval_protocol_any_n" in protocols_any_n(spec, folder, found)
    # Again, with the weights as they are: nothing is drawn and no judge is loaded.
    monkeypatch.setattr(generate, "generate", None)
    monkeypatch.setattr("fluidscale.evaluate.judges.evaluators.self_tested", None)
    (drawn / "two" / spec.id / "record.json").unlink()
    again = together(2, run, spec, drawn / "two" / spec.id, two)[0]
    assert all(again[name] == records[0][name] for name in records[0] if name.startswith(("geneval", "f", "clip")) and
               name != "finished_at")  # fmt: skip
    assert evaluate([str(folder), "--metrics", "geneval", "fid", "fd", "clip_score", "--json"]) == 0
    again = {one["name"]: one["value"] for one in json.loads(capsys.readouterr().out)}
    assert all(again[name] == alone[name] for name in ("geneval", "fid", "fd", "clip_score"))


def test_another_guidance_is_judged_by_the_judges_that_the_run_has(stack, drawn, capsys):
    files = {name: FILES[name] for name in ("fid_prompts", "clip")}
    spec, placement = planned(sweep(stack, files, "geneval_images_per_prompt: 0, fd_images: 3"))
    assert spec.evaluate.judges == ("clip_score",) and spec.evaluate.geneval_prompts_sha256 == ""
    assert {key for key in placement.assets if ":" in key} == {"judge:clip", "judge:fid_prompts"}
    run(spec, drawn / spec.id, placement)
    assert evaluate([str(drawn / spec.id), "--guidance-scale", "1,3", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["clip_score"] * 2
    assert len((drawn / "drawn-0").read_text().split()) == 9
    assert evaluate([str(drawn / spec.id), "--metrics", "fid"]) == 2
    assert "it has no such judge" in capsys.readouterr().err


def test_what_nobody_looks_at_has_no_part_in_a_runs_identity(stack):
    none = "geneval_images_per_prompt: 0, fd_images: 0"
    spec, placement = planned(sweep(stack, FILES, none))
    assert spec == planned(stack / "pictures.yaml")[0] and not [key for key in placement.assets if ":" in key]
    judged, _ = planned(sweep(stack, FILES))
    others = {**FILES, "geneval_prompts": "others.jsonl"}
    (stack / "others.jsonl").write_text((stack / "geneval.jsonl").read_text() + "\n")
    assert len({spec.id, judged.id, planned(sweep(stack, others))[0].id}) == 3
    assert judged.trunk_id == spec.trunk_id


def test_judges_are_part_of_the_plan_and_of_its_price(stack, capsys):
    asked = ["plan", str(sweep(stack, FILES)), "--arm", "discrete-raster", "--json"]
    assert launch.main(asked) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    # GenEval, FID, FD-DINOv2 and CLIPScore, image by image: the tiny model itself costs next to nothing.
    looked_at = 2 * 553 * 4.4e11 + CAPTIONS * (1.1e10 + 1.6e11 + 1.7e11)
    assert looked_at < row["evaluation_flops"] < 1.1 * looked_at


@pytest.mark.parametrize(
    ("files", "counts", "message"),
    [
        ({"detector": "mask2former"}, COUNTS, "judges: detector alone judges nothing; name geneval_prompts + detector"),
        ({**FILES, "clip": "nowhere"}, COUNTS, "judges: clip: no such file or folder"),
        ({**FILES, "clip": "images"}, COUNTS, "a folder in transformers' format is needed"),
        ({"inceptoin": "clip"}, COUNTS, "judges: unknown key 'inceptoin'; did you mean 'inception'"),
        ({**FILES, "fid_prompts": "texts.txt"}, COUNTS, "texts.txt: expected a JSON object with a text under 'prompt'"),
        ({**FILES, "geneval_prompts": "captions.jsonl"}, COUNTS, "captions.jsonl: 12 prompts, GenEval has 6"),
        (
            {**FILES, "dinov2_reference": "large.npz"},
            COUNTS,
            "draws 32 px, dinov2_reference is of images of 256 px; leave",
        ),
        (
            {**FILES, "dinov2_reference": "inception.npz"},
            COUNTS,
            "statistics of inception, which is not what dinov2_reference",
        ),
        ({**FILES, "dinov2_reference": "texts.txt"}, COUNTS, "not reference statistics of this program"),
        (FILES, COUNTS.replace("9", "13"), "evaluate.fd_images is 13, "),
        (FILES, COUNTS.replace("9", "3"), "discrete-raster 50K: evaluate.fd_images is 3: a distance needs at least 4"),
        ({}, "geneval_images_per_prompt: 4, fd_images: 0", "evaluate.geneval_images_per_prompt needs judges: geneval_"),
        ({}, "geneval_images_per_prompt: 0, fd_images: 9", "evaluate.fd_images needs judges: fid_prompts + inception"),
    ],
)
def test_judges_that_cannot_judge_are_refused_when_the_sweep_is_planned(stack, capsys, files, counts, message):
    assert launch.main(["plan", str(sweep(stack, files, counts, "bad")), "--arm", "discrete-raster"]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line


def test_an_embedded_world_has_judges_of_its_own(stack, capsys):
    (stack / "world.yaml").write_text(f"extends: {Path('sweeps/smoke').absolute()}\njudges: {{clip: {stack / 'clip'}, "
                                      f"fid_prompts: {stack / 'captions.jsonl'}}}\n")  # fmt: skip
    assert launch.main(["plan", str(stack / "world.yaml")]) == 2
    assert "an embedded world is judged by its own networks" in capsys.readouterr().err


def test_a_judge_that_changed_since_is_refused_before_anything_is_trained(stack, tmp_path, capsys):
    spec, placement = planned(sweep(stack, FILES))

    def moved(**files: Path):
        named = {f"judge:{name}": str(path) for name, path in files.items()}
        return dataclasses.replace(placement, assets={**placement.assets, **named})

    (tmp_path / "others.jsonl").write_text((stack / "captions.jsonl").read_text() * 2)
    shutil.copytree(stack / "clip", tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    facts = {"side": 32, "extractor": "dinov2", "extractor_sha256": "0" * 64}
    save_reference(tmp_path / "other.npz", Reference(np.zeros((4, 16)), facts))
    for number, (where, message) in enumerate((
        (moved(fid_prompts=tmp_path / "others.jsonl"), f"not the prompts that {spec.id} names"),
        (moved(clip=tmp_path / "torn"), "torn: does not load as CLIPModel"),
        (moved(clip=stack / "gelu"), "quick_gelu"),
        (moved(detector=tmp_path / "gone"), "judges: detector: no such file or folder"),
        (moved(dinov2_reference=stack / "large.npz"), f"images of 256 px, {spec.id} draws 32"),
        (moved(dinov2_reference=tmp_path / "other.npz"), "distances between them mean nothing"),
        (dataclasses.replace(placement, assets={k: v for k, v in placement.assets.items() if k != "judge:clip"}),
         "judges: clip: the placement does not say where it is"),
    )):  # fmt: skip
        assert message in refused(spec, where, tmp_path / str(number), capsys)


def test_a_process_that_fails_while_judging_ends_the_others_and_leaves_no_record(stack, drawn, monkeypatch):
    files = {name: FILES[name] for name in ("fid_prompts", "clip")}
    spec, placement = planned(sweep(stack, files, "geneval_images_per_prompt: 0, fd_images: 3", "failing"))
    folder, two = drawn / spec.id, dataclasses.replace(placement, strategy="ddp", devices=2)

    def faulty(*rest):
        raise OSError("the second process's fault")

    original = judge_scores.clip_scores
    monkeypatch.setattr(judge_scores, "clip_scores", lambda *a: (faulty if os.environ["RANK"] == "1" else original)(*a))
    with pytest.raises(AssertionError, match="Traceback"):
        together(2, run, spec, folder, two)
    assert RunFolder(folder).status["state"] == "failed" and RunFolder(folder).record is None
    # The next attempt finds weights and pictures.
    monkeypatch.setattr(judge_scores, "clip_scores", original)
    monkeypatch.setattr(generate, "generate", None)
    assert np.isfinite(together(2, run, spec, folder, two)[0]["clip_score"])
