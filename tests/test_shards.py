import dataclasses
import errno
import threading

import numpy as np
import pytest
import torch

from fluidscale.data import shards as module
from fluidscale.data.shards import Shards, ensure
from fluidscale.data.sources import WorldSource
from fluidscale.spec import InvalidInput
from fluidscale.world import World


def encode(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(start, start + count)
    return rows[:, None].repeat(4, 1).astype(np.int16), rows[:, None].astype(np.int64)


def test_rows_come_back_in_the_order_asked_for_across_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 10)
    shards = ensure(tmp_path / "data", {"a": 1}, 25, encode)
    rows = np.array([24, 0, 13, 9, 10, 24])
    tokens, text = shards.gather(rows)
    assert np.array_equal(tokens[:, 0], rows) and np.array_equal(text[:, 0], rows)


def test_what_is_there_is_not_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 10)
    calls = []

    def counted(start, count):
        calls.append(start)
        if len(calls) == 2:
            raise OSError("interrupted")
        return encode(start, count)

    with pytest.raises(OSError, match="interrupted"):
        ensure(tmp_path / "data", {"a": 1}, 25, counted)
    ensure(tmp_path / "data", {"a": 1}, 25, counted)
    ensure(tmp_path / "data", {"a": 1}, 25, counted)
    assert calls == [0, 10, 10, 20]


def test_a_full_disk_is_told_by_its_number_and_keeps_nothing_half_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError) as caught:
        ensure(tmp_path / "data", {"a": 1}, 25, encode)
    assert caught.value.errno == errno.ENOSPC and not list((tmp_path / "data").glob("*.tmp"))


def test_two_at_once_encode_once(tmp_path):
    calls = []

    def counted(start, count):
        calls.append(start)
        return encode(start, count)

    threads = [threading.Thread(target=ensure, args=(tmp_path / "data", {}, 8, counted)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [0]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    ensure(tmp_path / "data", {}, 8, encode)
    path = tmp_path / "data" / "tokens-00000.npy"
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content[:-5] if damage == "truncate" else content)
    with pytest.raises(InvalidInput, match=r"tokens-00000.npy: shard .*delete"):
        Shards(tmp_path / "data")


def test_other_data_under_the_same_name_is_refused(tmp_path):
    ensure(tmp_path / "data", {"a": 1}, 8, encode)
    with pytest.raises(InvalidInput, match="other data"):
        ensure(tmp_path / "data", {"a": 2}, 8, encode)


def test_a_worlds_codes_of_a_large_vocabulary_keep_their_numbers(tmp_path, tiny_spec):
    spec = tiny_spec("discrete-raster")
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, vocab_size=40_000))

    class Last:
        sha256 = "last"

        def encode(self, images):
            return torch.full((len(images), 16), 39_999)

    rows = WorldSource(spec, World(spec.data.world), Last(), tmp_path).training()
    codes, _ = rows.gather(np.arange(4), np.zeros(4, np.int64))
    assert (codes.long() == 39_999).all()
