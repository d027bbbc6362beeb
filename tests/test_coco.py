"""COCO-30K: list, reference, Inception in its file's format, FID by command, and no image twice over processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluidscale.evaluate.distances import frechet, moments
from fluidscale.evaluate.fid import distances
from fluidscale.evaluate.judges import scores as judge_scores
from fluidscale.evaluate.judges.__main__ import main as judge
from fluidscale.evaluate.judges.coco import coco_prompts, reference, squared
from fluidscale.evaluate.judges.coco import main as coco
from fluidscale.evaluate.judges.inception import Inception, load_inception, stretched
from fluidscale.evaluate.judges.reference import Reference, load_reference, save_reference
from fluidscale.evaluate.judges.scores import coco_protocol, prompts_sha256
from fluidscale.evaluate.share import Share
from fluidscale.spec import InvalidInput


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A random Inception saved with the names and shapes of pt_inception-2015-12-05."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(Inception().state_dict(), path)
    return path


def annotations(path: Path, images: int = 40) -> Path:
    captions = [{"image_id": 7 * k % 1009, "id": 3 * k, "caption": f" a dog\n no. {k} "} for k in range(2 * images)]
    captions += [{"image_id": 7 * k % 1009, "id": 10**6 + k, "caption": f"a cat no. {k}"} for k in range(images)]
    path.write_text(json.dumps({"annotations": captions[::-1]}))
    return path


def test_the_list_has_one_caption_an_image_and_is_the_same_everywhere(tmp_path, capsys):
    path = annotations(tmp_path / "captions.json")
    rows = coco_prompts(path, 60)
    assert len({row["image_id"] for row in rows}) == len(rows) == 60 and rows[0]["prompt"].startswith("a ")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"annotations": content["annotations"][::-1]}))
    assert coco_prompts(path, 60) == rows != coco_prompts(path, 60, seed=1)
    assert coco(["prompts", str(path), "--count", "60", "--out", str(tmp_path / "list.jsonl")]) == 0
    assert prompts_sha256(rows) in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()] == rows
    assert coco(["prompts", str(path), "--out", str(tmp_path / "list.jsonl")]) == 2
    assert capsys.readouterr().err == f"{path}: 80 images with captions, 30000 are needed\n"


def test_the_middle_square_is_resized_by_lanczos():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    expected = Image.fromarray(picture[:, 30:70]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(squared(Image.fromarray(picture), 16), np.asarray(expected))


def test_names_and_shapes_are_those_of_the_published_file():
    """94 convolutions of 5 tensors and a counter each, and the classifier; the size is Keras's "notop" count."""
    state = Inception().state_dict()
    assert len(state) == 94 * 6 + 2
    # Keras's normalisation has no scale: 21,802,784 are the convolutions and three numbers a channel.
    channels = sum(len(tensor) for name, tensor in state.items() if name.endswith("running_mean"))
    assert sum(tensor.numel() for tensor in state.values() if tensor.ndim == 4) + 3 * channels == 21_802_784
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3) and shapes["fc.weight"] == (1008, 2048)
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["Mixed_7a.branch7x7x3_4.bn.num_batches_tracked"] == ()


def test_stretching_is_tensorflow_1s():
    """Four columns to six: sources 0, .67, 1.33, 2, 2.67, 3.33, the last held at the edge; no half-pixel shift."""
    x = torch.tensor([[0.0, 3.0, 6.0, 12.0]]).expand(4, 4)[None, None]
    expected = torch.tensor([0.0, 2.0, 4.0, 6.0, 10.0, 12.0])
    torch.testing.assert_close(stretched(x, 6)[0, 0, 0], expected)


def test_inception_reads_its_file_and_refuses_others(weights, tmp_path):
    network = load_inception(weights)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    features = network(images)
    assert features.shape == (3, 2048) and features.dtype == np.float32 and len(network.sha256) == 64
    np.testing.assert_allclose(network(images[1:2]), features[1:2], rtol=1e-4, atol=1e-6)
    state = torch.load(weights, weights_only=True)
    del state["fc.bias"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InvalidInput, match=r"not FID's Inception .*fc\.bias"):
        load_inception(tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidInput, match="not a file of plain tensors"):
        load_inception(tmp_path / "torn.pth")
    with pytest.raises(InvalidInput, match="not readable"):
        load_inception(tmp_path / "none.pth")


class Means:
    """Features that are known: mean and corner of a picture."""

    name, sha256, width = "means", "a" * 64, 2

    def __call__(self, images):
        return np.stack([images.mean((1, 2, 3)), images[:, 0, 0, 0]], axis=1).astype(np.float32)


def pictures(folder: Path, count: int, low: int = 0, size: tuple[int, int] = (20, 30)) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(low)
    for k in range(count):
        Image.fromarray(rng.integers(low, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{k:04d}.png")
    return folder


def test_a_reference_is_kept_with_what_it_is_of(tmp_path):
    folder = pictures(tmp_path / "val", 7)
    found = reference(folder, Means(), 7)
    expected = np.stack([squared(Image.open(path)) for path in sorted(folder.iterdir())])
    assert np.array_equal(found.features, Means()(expected)) and found.facts["extractor_sha256"] == "a" * 64
    save_reference(tmp_path / "kept.npz", found)
    kept = load_reference(tmp_path / "kept.npz", Means())
    assert np.array_equal(kept.features, found.features) and kept.facts == found.facts

    class Other(Means):
        sha256 = "b" * 64

    with pytest.raises(InvalidInput, match=r"statistics of means aaaaaaaaaaaa\.\., judged with means bbbbbbbbbbbb"):
        load_reference(tmp_path / "kept.npz", Other())
    with pytest.raises(InvalidInput, match="7 images, the reference has 40504"):
        reference(folder, Means())
    (folder / "0003.png").write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match=r"0003\.png: not a readable picture"):
        reference(folder, Means(), 7)


def drawn(folder: Path, count: int, side: int = 256) -> Path:
    pictures(folder, count, 60, (side, side))
    lines = [{"file": f"{k:04d}.png", "prompt": f"a dog {k}"} for k in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "drawing.json").write_text(json.dumps({"sampling": {"guidance_scale": 5}}))
    return folder


def few_features(name, drawn_features, real_features, *rest):
    """The real distances on every 32nd feature."""
    return distances(name, drawn_features[:, ::32], real_features[:, ::32], *rest)


def test_fid_by_command_and_what_is_refused(weights, tmp_path, capsys, monkeypatch):
    real, folder = pictures(tmp_path / "val", 12), drawn(tmp_path / "drawn", 8)
    kept = tmp_path / "kept.npz"
    making = [
        "reference",
        str(real),
        "--count",
        "12",
        "--inception",
        str(weights),
        "--out",
        str(kept),
        "--device",
        "cpu",
    ]
    assert coco(making) == 0
    # Few images are enough for the way; distances of 2048 features would take minutes.
    monkeypatch.setattr(judge_scores, "distances", few_features)
    judging = [str(folder), "--inception", str(weights), "--reference", str(kept), "--device", "cpu", "--count"]
    assert judge([*judging, "8", "--json"]) == 0
    scores = {one["metric"]: one for one in json.loads(capsys.readouterr().out.split("\n", 1)[1])}
    # Eight images cannot be extrapolated: the refusal is said beside the score.
    assert scores["fid"]["extra"]["fid_inf_refused"].startswith("FEW_IMAGES")
    assert {"fid", "kid", "precision", "recall"} == set(scores) and scores["fid"]["unit"] == "FID-inception"
    network = load_inception(weights)
    both = [
        network(np.stack([squared(Image.open(path)) for path in sorted(at.glob("*.png"))])) for at in (folder, real)
    ]
    assert scores["fid"]["value"] == pytest.approx(
        frechet(*(moments(features[:, ::32]) for features in both)), rel=1e-4
    )
    assert scores["fid"]["protocol"].startswith("coco0k-inception-")
    facts = scores["fid"]["extra"]
    assert facts["reference"]["n"] == 12 and facts["sampling"] == {"guidance_scale": 5} and facts["prompts_sha256"]
    # Arms that are drawn each under a guidance of its own are compared: it is told, and is not part of the protocol.
    names = [coco_protocol("inception", [{"prompt": "a"}], {}, {"guidance_scale": scale})[0] for scale in (1.6, 5)]
    assert names[0] == names[1]
    assert judge([*judging, "30000"]) == 2
    assert "8 prompts, the protocol has 30000" in capsys.readouterr().err
    small = drawn(tmp_path / "small", 4, side=64)
    assert judge([str(small), *judging[1:], "4"]) == 2
    assert "images of 64 x 64 px, the reference's are 256 x 256" in capsys.readouterr().err
    other = tmp_path / "other.npz"
    facts = json.loads(str(np.load(kept)["facts"])) | {"extractor_sha256": "c" * 64}
    save_reference(other, Reference(np.zeros((12, 2048), np.float32), facts))
    assert judge([str(folder), "--inception", str(weights), "--reference", str(other), "--count", "8"]) == 2
    assert "distances between them mean nothing" in capsys.readouterr().err
    assert judge([str(folder), "--inception", str(weights)]) == 2
    assert capsys.readouterr().err.startswith("--reference goes with one of")


SHARED = """
import sys, numpy as np
from pathlib import Path
from test_coco import Means
from fluidscale.evaluate.judges.coco import reference
from fluidscale.evaluate.extract import features_of
from fluidscale.evaluate.samples import read_samples
from fluidscale.evaluate.share import share_of_environment
root, share = Path(sys.argv[1]), share_of_environment()
seen = []
class Counting(Means):
    def __call__(self, images):
        seen.append(len(images))
        return super().__call__(images)
features = features_of(read_samples(root / "drawn"), Counting(), root / f"cache{share.rank}", share)
found = reference(root / "val", Counting(), 5, share)
np.savez(root / f"rank{share.rank}.npz", features=features, real=found.features, seen=seen)
assert share.ranks == 2
import torch.distributed
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_see_every_image_once(tmp_path):
    pictures(tmp_path / "val", 5)
    drawn(tmp_path / "drawn", 7, side=32)
    (tmp_path / "work.py").write_text(SHARED)
    # Seven and five images over two: a sampler that pads would see eight and six.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517",
               str(tmp_path / "work.py"), str(tmp_path)]  # fmt: skip
    here = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        command, env={**__import__("os").environ, **here}, capture_output=True, text=True, timeout=240
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    a, b = (np.load(tmp_path / f"rank{rank}.npz") for rank in (0, 1))
    alone = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "drawn").glob("*.png"))])
    for rank in (a, b):
        assert np.array_equal(rank["features"], Means()(alone))
        assert np.array_equal(rank["real"], reference(tmp_path / "val", Means(), 5).features)
    assert sorted([int(a["seen"].sum()), int(b["seen"].sum())]) == [5, 7]


def test_a_share_deals_by_index():
    items = list(range(7))
    assert [Share(rank, 3).mine(items) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert np.array_equal(Share().gathered(np.arange(3)), np.arange(3))
