"""Pictures and captions to shards: every form of data set, any share of the work, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from real_formats import coco, pictures, tiny_t5, tiny_vq
from safetensors.torch import load_file, save_file

from fluidscale.data import encoding
from fluidscale.data.captioned import CaptionedShards, file_facts, read_manifest, verify
from fluidscale.data.datasets import open_dataset
from fluidscale.data.encoding import Encoder, encode_part
from fluidscale.data.pictures import square
from fluidscale.data.sampler import positions, samples_at
from fluidscale.encode import main
from fluidscale.spec import InvalidInput
from fluidscale.tokens.image import load_tokenizer
from fluidscale.tokens.text import TextEncoder

IMAGES, PER_PART, VAL = 21, 6, 4


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A folder with pictures, COCO captions, a VQModel and a T5 encoder; shards/ holds them encoded."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("stack")
    tiny_vq(root / "vq")
    tiny_t5(root / "t5")
    paths = pictures(root / "images", IMAGES)
    shutil.copy(paths[0], root / "images" / "again.png")
    coco(root / "captions.json", [*paths, root / "images" / "again.png"])
    assert main(command(root, "shards")) == 0
    return root


def command(root, out, *more):
    """A call of fluidscale.encode on the stack."""
    given = {"--captions": root / "captions.json", "--tokenizer": root / "vq", "--text-encoder": root / "t5"}
    given |= {"--text-length": 6, "--val-images": VAL, "--rows-per-part": PER_PART, "--out": root / out}
    words = [str(root / "images"), *(str(word) for pair in given.items() for word in pair)]
    return [*words, *(str(word) for word in more)]


def replaced(words, option, value):
    words = list(words)
    words[words.index(option) + 1] = str(value)
    return words


def test_shards_hold_the_tokens_and_the_captions_of_their_images(stack):
    index = pyarrow.parquet.read_table(stack / "shards" / "index.parquet").to_pylist()
    assert [row["split"] for row in index].count("val") == VAL
    tokenizer = load_tokenizer(str(stack / "vq"))
    for split in ("train", "val"):
        shards = CaptionedShards(stack / "shards", split)
        rows = [row for row in index if row["split"] == split]
        if split == "val":
            # In the order of hashes: the first few of them are as good as random too.
            rows.sort(key=lambda row: row["sha256"])
        assert shards.rows == len(rows)
        everything = np.arange(shards.rows)
        images = np.stack([square((stack / "images" / row["image"]).read_bytes(), 32) for row in rows])
        assert torch.equal(shards.tokens(everything).long(), tokenizer.encode(images))
        # An image's captions take turns, visit by visit; only real tokens are kept.
        for visit in range(3):
            ids = shards.text("ids", everything, np.full(shards.rows, visit))
            lengths = [min(6, len(row["captions"][visit % len(row["captions"])].split()) + 1) for row in rows]
            assert [len(one) for one in ids] == lengths
            features = shards.text("features", everything, np.full(shards.rows, visit))
            assert [tuple(one.shape) for one in features] == [(n, 12) for n in lengths]
            assert features[0].dtype == torch.bfloat16


def test_images_of_equal_bytes_are_kept_once(stack):
    manifest = read_manifest(stack / "shards")
    assert manifest["duplicates"] == 1 and manifest["rejected"] == 0
    assert manifest["splits"] == {"train": IMAGES - VAL, "val": VAL}


def test_any_share_of_the_work_gives_the_same_manifest(stack):
    for part in ("1/3", "0/3"):
        assert main(command(stack, "shared", "--shard", part)) == 0
        assert not (stack / "shared" / "manifest.json").exists()
    assert main(command(stack, "shared", "--shard", "2/3")) == 0
    assert main(command(stack, "spawned", "--workers", "2")) == 0
    wanted = (stack / "shards" / "manifest.json").read_bytes()
    assert (stack / "shared" / "manifest.json").read_bytes() == wanted
    assert (stack / "spawned" / "manifest.json").read_bytes() == wanted


def test_a_stopped_encoding_goes_on_where_it_was(stack, monkeypatch):
    whole, encoded = encoding.encode_part, []

    def interrupted(folder, index, items, encoder, progress):
        if index == 2 and "stopped" not in encoded:
            encoded.append("stopped")
            raise KeyboardInterrupt
        whole(folder, index, items, encoder, encoded.append)

    monkeypatch.setattr(encoding, "encode_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(command(stack, "stopped"))
    assert encoded == [PER_PART, PER_PART, "stopped"]
    (stack / "stopped" / "part-00002-tokens.npy").write_bytes(b"torn")
    assert main(command(stack, "stopped")) == 0
    assert encoded[3:] == [PER_PART, IMAGES + 1 - 3 * PER_PART]
    assert (stack / "stopped" / "manifest.json").read_bytes() == (stack / "shards" / "manifest.json").read_bytes()


def test_two_processes_on_one_part_leave_what_they_recorded(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 4)
    (part, *_) = open_dataset(stack / "images", stack / "captions.json", PER_PART).parts
    tokenizer, half, other_begins, asked = load_tokenizer(str(stack / "vq")), threading.Event(), threading.Event(), []

    class Slow(TextEncoder):
        def features(self, ids):
            asked.append(threading.current_thread().name)
            if asked == ["first", "first"]:
                # In the middle of the file: here the other one would begin the same file anew.
                half.set()
                other_begins.wait(1)
            if "second" in asked:
                other_begins.set()
                first.join()
            return super().features(ids)

    def encode():
        text = Slow(stack / "t5", "bfloat16", 6, "cpu")
        encode_part(tmp_path, 0, part(), Encoder(tokenizer, text, "cached"), lambda images: None)

    first, second = (threading.Thread(target=encode, name=name) for name in ("first", "second"))
    (tmp_path / ".part-00000-features.npy.7.tmp").write_bytes(b"of a process that was killed")
    first.start()
    assert half.wait(60)
    second.start()
    for thread in (first, second):
        thread.join()
    recorded = json.loads((tmp_path / "part-00000.json").read_text())["files"]
    assert recorded == {name: file_facts(tmp_path / name) for name in recorded}
    assert set(asked) == {"first"} and not list(tmp_path.glob("*.tmp"))


def test_bad_pictures_are_listed_and_never_fatal(stack):
    images = stack / "damaged"
    shutil.copytree(stack / "images", images)
    whole = (images / f"{3:012d}.png").read_bytes()
    (images / f"{3:012d}.png").write_bytes(whole[: len(whole) // 2])
    (images / f"{5:012d}.png").write_bytes(b"")
    words = command(stack, "damaged-shards")
    words[0] = str(images)
    assert main(words) == 0
    lines = (stack / "damaged-shards" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == [f"{3:012d}.png", f"{5:012d}.png"]
    assert read_manifest(stack / "damaged-shards")["splits"]["train"] == IMAGES - VAL - 2


def test_tables_and_tars_hold_the_same_items(stack, tmp_path):
    listed = open_dataset(stack / "images", stack / "captions.json", PER_PART)
    items = {item.name: item for part in listed.parts for item in part()}
    rows = [(name, caption) for name, item in items.items() for caption in item.captions]
    table = pyarrow.table({"image": [f"images/{n}" for n, _ in rows], "caption": [c for _, c in rows]})
    pyarrow.parquet.write_table(table, stack / "table.parquet")
    quoted = "".join(f'images/{name},"{caption}"\n' for name, caption in rows)
    (stack / "table.csv").write_text(f"image,caption\n{quoted}")
    for name in ("table.parquet", "table.csv"):
        found = {item.name: item for part in open_dataset(stack / name, None, 100).parts for item in part()}
        assert {f"images/{name}": item.captions for name, item in items.items()} == {
            name: item.captions for name, item in found.items()
        }
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for name, item in items.items():
            members = {".png": item.read(), ".txt": item.captions[0].encode()}
            if name == f"{2:012d}.png":
                members[".txt"] = b"caf\xe9"
            for ending, data in members.items():
                entry = tarfile.TarInfo(name.removesuffix(".png") + ending)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    (part,) = open_dataset(tmp_path, None, 1).parts
    for item in part():
        name = item.name.removeprefix("00000.tar/") + ".png"
        if name == f"{2:012d}.png":
            assert item.fault.startswith("caption unreadable")
        else:
            assert item.captions == items[name].captions[:1] and item.read() == items[name].read()


def test_pictures_are_cut_to_their_centre_square():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = (200, 100, 50)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    assert (square(content.getvalue(), 8) == (200, 100, 50)).all()
    clear = io.BytesIO()
    Image.new("RGBA", (10, 10), (255, 0, 0, 0)).save(clear, "PNG")
    assert (square(clear.getvalue(), 8) == 255).all()


def test_every_world_size_and_every_restart_sees_the_same_global_batches(stack):
    shards, batch, steps = CaptionedShards(stack / "shards", "train"), 8, range(12)

    def read(where):
        rows, visits = samples_at(5, shards.rows, where), where // shards.rows
        ids = [shards.text("ids", row, visit) for row, visit in zip(rows, visits, strict=True)]
        return [shards.tokens(row) for row in rows], [[one.tolist() for one in step] for step in ids]

    tokens, ids = read(positions(batch, steps))
    for world_size in (1, 2, 4):
        ranks = [read(positions(batch, steps, rank, world_size)) for rank in range(world_size)]
        for step in steps:
            assert torch.equal(torch.cat([rank[0][step] for rank in ranks]), tokens[step])
            assert [one for rank in ranks for one in rank[1][step]] == ids[step]
    for start in steps:
        again, texts = read(positions(batch, range(start, len(steps))))
        assert all(torch.equal(a, b) for a, b in zip(again, tokens[start:], strict=True)) and texts == ids[start:]


def refused(capsys, words, out):
    """The one line that a call ends in; it must leave nothing behind."""
    assert main(words) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and not out.exists()
    return line


def test_input_of_no_use_is_refused_before_anything_is_written(stack, tmp_path, capsys):
    out = tmp_path / "out"
    good = replaced(command(stack, "x"), "--out", out)
    captions = json.loads((stack / "captions.json").read_text())
    captions["images"][2]["file_name"] = "gone.png"
    (tmp_path / "missing.json").write_text(json.dumps(captions))
    line = refused(capsys, replaced(good, "--captions", tmp_path / "missing.json"), out)
    assert "1 of 22 images are not in" in line and "gone.png" in line and "--allow-missing" in line
    (tmp_path / "latin.json").write_bytes(b'{"images": [], "annotations": [{"caption": "caf\xe9"}]}')
    assert "not UTF-8 at byte 47" in refused(capsys, replaced(good, "--captions", tmp_path / "latin.json"), out)
    (tmp_path / "other.json").write_text("[1]")
    assert "not COCO's captions" in refused(capsys, replaced(good, "--captions", tmp_path / "other.json"), out)
    assert "no config.json" in refused(capsys, replaced(good, "--text-encoder", stack), out)
    assert "no such network" in refused(capsys, replaced(good, "--tokenizer", "nothing"), out)
    assert "expected I/N" in refused(capsys, [*good, "--shard", "3/3"], out)


def test_damaged_networks_are_refused_before_anything_is_written(stack, tmp_path, capsys):
    out, good = tmp_path / "out", command(stack, "x")
    good = replaced(good, "--out", out)
    for name, option, file, key in (
        ("vq", "--tokenizer", "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
        ("t5", "--text-encoder", "model.safetensors", "encoder.final_layer_norm.weight"),
    ):
        folder = shutil.copytree(stack / name, tmp_path / name)
        weights = load_file(folder / file)
        del weights[key]
        save_file(weights, folder / file)
        assert f"are missing, first {key}" in refused(capsys, replaced(good, option, folder), out)
        (folder / file).unlink()
        torch.save({"weights": pytest.raises}, folder / file.replace(".safetensors", ".bin"))
        assert "not a file of plain tensors" in refused(capsys, replaced(good, option, folder), out)
    wider = shutil.copytree(stack / "t5", tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "d_model": 24}))
    assert str(wider) in refused(capsys, replaced(good, "--text-encoder", wider), out)


def test_what_is_there_is_checked_and_never_overwritten(stack, capsys):
    folder = stack / "checked"
    shutil.copytree(stack / "shards", folder)
    assert main(command(stack, "checked")) == 0 and "every byte checked" in capsys.readouterr().out
    assert main(replaced(command(stack, "checked"), "--text-length", 7)) == 2
    assert "holds other data" in capsys.readouterr().err
    with pytest.raises(InvalidInput, match="which the run names"):
        CaptionedShards(folder, "train", "0" * 64)
    path = folder / "part-00001-tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"part-00001-tokens.npy: .*delete part-00001.json"):
        verify(folder)
    path.write_bytes(content[:-3])
    with pytest.raises(InvalidInput, match=r"part-00001-tokens.npy: \d+ bytes, the manifest says"):
        CaptionedShards(folder, "train")


def test_too_few_images_for_validation_are_refused(stack, capsys):
    assert main(replaced(command(stack, "few"), "--val-images", IMAGES)) == 2
    assert "lower --val-images" in capsys.readouterr().err
