"""One run in several processes: the same losses, weights and global batches, whatever the placement."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from processes import together
from safetensors.torch import load_file

from fluidscale.folder import RunFolder
from fluidscale.record import Placement
from fluidscale.run import run
from fluidscale.spec import ARMS, InvalidInput
from fluidscale.train.batches import Share, share_of
from fluidscale.train.callbacks import Stopped

ONE = Placement(device="cpu", checkpoint_steps=3)
DDP = dataclasses.replace(ONE, strategy="ddp", devices=2, micro_batch=2)
FSDP = dataclasses.replace(ONE, strategy="fsdp", devices=2, recompute=True)


def small(tiny_spec, arm, steps=5):
    spec = tiny_spec(arm, steps=steps, decay_steps=1)
    return dataclasses.replace(spec, evaluate=dataclasses.replace(spec.evaluate, val_images=0))


def train(spec, run_dir, placement, stop_at=None):
    """Runs, or stops after so many steps; each process asks once a step."""
    asked = iter(range(1, 1_000_000))
    try:
        return run(spec, run_dir, placement, lambda: next(asked) == stop_at)
    except Stopped:
        return None


def loss_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["train_loss"], lines[-1]["grad_norm"]


def weights(run_dir):
    return load_file(RunFolder(run_dir).weights)


@pytest.mark.parametrize("arm", ARMS)
def test_five_steps_are_the_same_in_one_process_and_in_two_ddp_or_fsdp(tmp_path, tiny_spec, arm):
    spec = small(tiny_spec, arm)
    straight = train(spec, tmp_path / "one" / spec.id, ONE)
    for placement in (DDP, FSDP):
        folder = tmp_path / placement.strategy / spec.id
        records = together(2, train, spec, folder, placement)
        assert records[0]["status"] == straight["status"] == "done" and records[1] is None
        assert loss_of(folder) == pytest.approx(loss_of(tmp_path / "one" / spec.id), rel=1e-5)
        # Adam takes steps of the learning rate where the gradient is rounding alone (a key's bias has none), so that
        # rounding may move one number by a share of a step, as far as the average of weights lets it in, and not many.
        step = (1 - spec.train.ema_decay) * spec.train.lr
        for name, tensor in weights(tmp_path / "one" / spec.id).items():
            apart = (weights(folder)[name] - tensor).abs()
            assert apart.max() <= 0.5 * step and apart.mean() <= 0.02 * step, name


def test_a_world_is_judged_by_two_processes_as_by_one(tmp_path, tiny_spec):
    """An embedded world's run is measured as one process measures it: same prompts, same number of images."""
    spec = tiny_spec("discrete-raster", steps=5, decay_steps=1)
    spec = dataclasses.replace(spec, evaluate=dataclasses.replace(spec.evaluate, geneval_images_per_prompt=1))
    alone = train(spec, tmp_path / "one" / spec.id, ONE)
    shared = together(2, train, spec, tmp_path / "two" / spec.id, DDP)[0]
    for metric in ("geneval", "geneval_unseen", "detector_agreement", "val_loss"):
        assert np.isfinite(shared[metric]) and shared[f"{metric}_n"] == alone[f"{metric}_n"]
        assert shared[f"{metric}_protocol"] == alone[f"{metric}_protocol"]
    folders = [next((tmp_path / name / spec.id / "samples").glob("seen-*")) for name in ("one", "two")]
    assert len({frozenset(path.name for path in folder.glob("*.png")) for folder in folders}) == 1


def test_sharded_bfloat16_is_one_process_in_bfloat16_to_its_tolerance(tmp_path, tiny_spec):
    spec = small(tiny_spec, "continuous-random")
    half = dataclasses.replace(FSDP, precision="bf16-mixed")
    train(spec, tmp_path / "one" / spec.id, dataclasses.replace(ONE, precision="bf16-mixed"))
    together(2, train, spec, tmp_path / "two" / spec.id, half)
    assert loss_of(tmp_path / "two" / spec.id) == pytest.approx(loss_of(tmp_path / "one" / spec.id), rel=0.01)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_stopped_run_goes_on_with_another_number_of_processes_and_parts(tmp_path, tiny_spec, strategy):
    spec = small(tiny_spec, "continuous-random", steps=12)
    two = dataclasses.replace(DDP if strategy == "ddp" else FSDP, micro_batch=4)
    one = dataclasses.replace(two, devices=1, micro_batch=2, strategy="single" if strategy == "ddp" else "fsdp")
    straight, folder = tmp_path / "one" / spec.id, tmp_path / "two" / spec.id
    train(spec, straight, ONE)
    assert together(2, train, spec, folder, two, 5) == [None, None]
    assert RunFolder(folder).status["state"] == "stopped"
    assert together(1, train, spec, folder, one, 3) == [None]
    assert "training from step 5 of 12" in (folder / "log.txt").read_text()
    newest, previous = folder / "ckpt" / "last.ckpt", folder / "ckpt" / "previous.ckpt"
    assert newest.exists() and previous.exists() and newest.is_dir() == (strategy == "fsdp")
    if strategy == "fsdp":  # damage costs only the steps since the one before
        shard = next(newest.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        newest.write_bytes(newest.read_bytes()[:-100])
    together(2, train, spec, folder, two)
    assert "does not load" in (folder / "log.txt").read_text()
    assert loss_of(folder) == pytest.approx(loss_of(straight), rel=1e-5)
    assert weights(folder).keys() == weights(straight).keys()
    assert not newest.exists() and not previous.exists()


def told_alone(spec, run_dir, placement):
    """Trains; the last process is told to stop in the middle of its third step, where the others wait for it."""
    told, steps = [], iter(range(1, 1_000_000))
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))

    def should_stop():
        if next(steps) == 3 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return bool(told)

    with pytest.raises(Stopped, match="step 3"):
        run(spec, run_dir, placement, should_stop)
    return len(told)


def test_all_stop_after_the_step_in_which_one_process_was_told(tmp_path, tiny_spec):
    spec = small(tiny_spec, "discrete-raster")
    folder = tmp_path / spec.id
    assert together(2, told_alone, spec, folder, dataclasses.replace(DDP, micro_batch=1)) == [0, 1]
    assert RunFolder(folder).status["state"] == "stopped" and (folder / "ckpt" / "last.ckpt").exists()


def test_a_checkpoint_of_the_other_form_is_refused_in_one_line(tmp_path, tiny_spec):
    spec = small(tiny_spec, "discrete-raster")
    together(1, train, spec, tmp_path / spec.id, dataclasses.replace(FSDP, devices=1), 2)
    with pytest.raises(InvalidInput, match="strategy fsdp; keep that"):
        run(spec, tmp_path / spec.id, ONE)


def test_processes_are_started_where_nobody_has(tmp_path, tiny_spec):
    spec = small(tiny_spec, "discrete-raster")
    record = run(spec, tmp_path / spec.id, dataclasses.replace(DDP, micro_batch=0))
    assert record["status"] == "done" and RunFolder(tmp_path / spec.id).record == record
    assert weights(tmp_path / spec.id)
    with pytest.raises(InvalidInput, match="srun"):
        run(spec, tmp_path / "other" / spec.id, dataclasses.replace(DDP, nodes=2))


@pytest.mark.parametrize(("change", "words"), [({"strategy": "zero"}, "known: single, ddp, fsdp"),
                                               ({"devices": 2}, "need strategy ddp or fsdp")])  # fmt: skip
def test_a_placement_that_cannot_train_is_refused(tmp_path, tiny_spec, change, words):
    spec = small(tiny_spec, "discrete-raster")
    with pytest.raises(InvalidInput, match=words):
        run(spec, tmp_path / spec.id, dataclasses.replace(ONE, **change))
    assert not (tmp_path / spec.id).exists()


def test_shares_cover_the_batch_once_in_order():
    placement = Placement(devices=2, nodes=2, strategy="ddp", micro_batch=3)
    shares = [share_of(24, placement, rank) for rank in range(4)]
    assert [s for share in shares for s in share.slices] == [slice(k, k + 3) for k in range(0, 24, 3)]
    assert share_of(24, Placement()) == Share(24)
    for batch, micro in ((23, 0), (24, 4), (3, 0)):
        with pytest.raises(InvalidInput, match="does not divide"):
            share_of(batch, dataclasses.replace(placement, micro_batch=micro))
