"""One run: resuming changes nothing, siblings share their trunk, damage is survived."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fluidscale.flops import train_flops
from fluidscale.folder import RunFolder, trunk_checkpoint, trunk_folder
from fluidscale.record import VOLATILE, Placement, is_full, read_json, write_json
from fluidscale.run import load_trained, main, run
from fluidscale.spec import ARMS, InvalidInput, to_json
from fluidscale.train.callbacks import Monitor, Stopped
from fluidscale.train.checkpoint import NEWEST

OFTEN = Placement(device="cpu", checkpoint_steps=5)


def stop_after(calls: int):
    """A should_stop that says yes at its `calls`-th asking: training asks once a step."""
    asked = iter(range(1, 1_000_000))
    return lambda: next(asked) >= calls


def weights(run_dir):
    return RunFolder(run_dir).weights.read_bytes()


def faithful(record):
    return {key: value for key, value in record.items() if key not in VOLATILE}


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"]) for line in lines]


@pytest.mark.parametrize("arm", ARMS)
def test_a_stopped_run_ends_as_a_straight_one_bit_for_bit(tmp_path, tiny_spec, arm):
    spec = tiny_spec(arm, steps=60, decay_steps=15)
    straight = run(spec, tmp_path / "a" / spec.id, OFTEN)
    for stop in (7, 30, 11):
        with pytest.raises(Stopped):
            run(spec, tmp_path / "b" / spec.id, OFTEN, stop_after(stop))
    resumed = run(spec, tmp_path / "b" / spec.id, OFTEN)
    assert weights(tmp_path / "a" / spec.id) == weights(tmp_path / "b" / spec.id)
    assert faithful(straight) == faithful(resumed)
    assert losses(tmp_path / "a" / spec.id) == losses(tmp_path / "b" / spec.id)


def test_siblings_share_a_trunk_and_end_as_straight_runs(tmp_path, tiny_spec):
    specs = [tiny_spec("discrete-random", steps=n, decay_steps=n // 4) for n in (24, 48, 96)]
    branches = tuple(spec.train.branch_step for spec in specs)
    for spec in specs:
        run(spec, tmp_path / "shared" / spec.id, dataclasses.replace(OFTEN, branch_steps=branches))
        alone = run(spec, tmp_path / spec.id / spec.id, OFTEN)
        assert weights(tmp_path / "shared" / spec.id) == weights(tmp_path / spec.id / spec.id)
        assert alone["trunk_id"] == specs[0].trunk_id
    log = (tmp_path / "shared" / specs[2].id / "log.txt").read_text()
    assert f"training from step {branches[1]} of 96" in log
    # The longest run leaves the newest checkpoint, from which a still longer one can go on.
    left = sorted(path.name for path in trunk_folder(tmp_path / "shared", specs[0].trunk_id).iterdir())
    assert left == [f"step-{branches[2]:08d}.ckpt", f"step-{branches[2]:08d}.jsonl"]


def test_a_corrupt_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, tiny_spec):
    spec = tiny_spec("continuous-raster", steps=40, decay_steps=5)
    straight = tmp_path / "a" / spec.id
    run(spec, straight, OFTEN)
    broken = tmp_path / "b" / spec.id
    with pytest.raises(Stopped):
        run(spec, broken, OFTEN, stop_after(22))
    newest = broken / "ckpt" / "last.ckpt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    run(spec, broken, OFTEN)
    log = (broken / "log.txt").read_text()
    assert "does not load" in log and "training from step 20 of 40" in log
    assert weights(straight) == weights(broken)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_is_never_lightnings_and_the_same_command_continues(tmp_path, tiny_spec, monkeypatch, capfd, times):
    spec = tiny_spec("discrete-raster")
    folder, after_step = RunFolder(tmp_path / "b" / spec.id), Monitor.after_step

    def interrupted(self, trainer, module):
        after_step(self, trainer, module)
        for _ in range(times if trainer.global_step == 7 else 0):
            signal.raise_signal(signal.SIGINT)

    run(spec, tmp_path / "a" / spec.id, OFTEN)
    (tmp_path / "spec.json").write_text(to_json(spec))
    (tmp_path / "where.json").write_text(json.dumps(dataclasses.asdict(OFTEN)))
    words = [str(tmp_path / "spec.json"), "--dir", str(folder.path), "--placement", str(tmp_path / "where.json")]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as hooked:
        hooked.setattr(Monitor, "after_step", interrupted)
        assert main(words) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert folder.status["state"] == "stopped"
    assert "the same command continues" in capfd.readouterr().err.splitlines()[-1]
    assert main(words) == 0
    # Asked once it stops after its step; asked twice it falls back on the checkpoint before.
    assert f"training from step {7 if times == 1 else 5} of 24" in (folder.path / "log.txt").read_text()
    assert weights(folder.path) == weights(tmp_path / "a" / spec.id)


def test_a_loss_that_is_not_finite_is_a_result(tmp_path, tiny_spec):
    spec = tiny_spec("continuous-random", steps=50, lr=1e30)
    record = run(spec, tmp_path / spec.id, OFTEN)
    assert record["status"] == "diverged" and "val_loss" not in record
    assert RunFolder(tmp_path / spec.id).status["state"] == "diverged"
    assert not record["lr_decay_complete"]


def test_a_finished_run_costs_nothing(tmp_path, tiny_spec):
    spec = tiny_spec("discrete-raster")
    first = run(spec, tmp_path / spec.id, OFTEN)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / spec.id).rglob("*")}
    assert run(spec, tmp_path / spec.id, OFTEN) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / spec.id).rglob("*")} == before


def test_hours_count_those_who_trained_and_those_who_judged(tmp_path, tiny_spec):
    spec = tiny_spec("discrete-raster")
    folder = RunFolder(tmp_path / spec.id)
    run(spec, folder.path, dataclasses.replace(OFTEN, evaluate=False))
    cost = {**read_json(folder.checkpoints / "cost.json"), "seconds": 3600.0, "tokens_per_s": 1e6}
    assert cost["processes"] == 1
    write_json(folder.checkpoints / "cost.json", {**cost, "processes": 8})
    record = run(spec, folder.path, dataclasses.replace(OFTEN, peak_flops=1e12))
    assert 8.0 < record["gpu_hours"] < 8.1
    assert record["mfu"] == pytest.approx(1e6 / (spec.images * 16) * train_flops(spec) / 8e12)


def test_weights_that_find_no_room_are_the_disks_fault(tmp_path, tiny_spec, monkeypatch):
    def full(state, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    spec = tiny_spec("discrete-raster")
    monkeypatch.setattr("fluidscale.train.fit.save_file", full)
    with pytest.raises(OSError) as caught:
        run(spec, tmp_path / spec.id, OFTEN)
    assert is_full(caught.value) and RunFolder(tmp_path / spec.id).status["state"] != "failed"


def test_a_folder_of_another_run_is_refused(tmp_path, tiny_spec):
    spec, other = tiny_spec("discrete-raster"), tiny_spec("discrete-raster", lr=1e-3)
    with pytest.raises(Stopped):
        run(spec, tmp_path / "x", OFTEN, stop_after(1))
    with pytest.raises(InvalidInput, match="holds another run"):
        run(other, tmp_path / "x", OFTEN)


def test_a_checkpoint_of_another_spec_is_refused_in_one_line(tmp_path, tiny_spec, capsys):
    spec, other = tiny_spec("discrete-raster"), dataclasses.replace(tiny_spec("discrete-raster"), seed=1)
    for one in (spec, other):
        with pytest.raises(Stopped):
            run(one, tmp_path / one.id, OFTEN, stop_after(1))
    folder, newest = tmp_path / spec.id, Path("ckpt", NEWEST)
    shutil.copy(tmp_path / other.id / newest, folder / newest)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.suffix in (".ckpt", ".jsonl")}
    (tmp_path / "where.json").write_text(json.dumps(dataclasses.asdict(OFTEN)))
    words = [str(folder / "spec.json"), "--dir", str(folder), "--placement", str(tmp_path / "where.json")]
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"a checkpoint of {other.id}, not of {spec.id}" in line and str(folder / newest) in line
    assert all(path.read_bytes() == content for path, content in before.items())
    assert RunFolder(folder).record is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("spec", b"[]", "spec.json: expected keys and values, got []"),
        ("spec", b"\xff", "spec.json: not readable"),
        ("spec", b'{"model": 3}', "spec.json: model: expected keys and values, got 3"),
        ("spec", None, "spec.json: not readable"),
        ("placement", b"[]", "placement.json: expected keys and values, got []"),
        ("placement", b"\xff", "placement.json: not text"),
        ("placement", b"{", "placement.json: not JSON"),
        ("placement", b'{"device": "gpu"}', "placement.json: device: unknown 'gpu'"),
        ("placement", b'{"threads": 0}', "placement.json: threads: expected at least 1, got 0"),
        ("placement", None, "placement.json: a folder"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, tiny_spec, capsys, name, content, message):
    (tmp_path / "spec.json").write_text(to_json(tiny_spec("discrete-raster")))
    path = tmp_path / f"{name}.json"
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    words = [str(tmp_path / "spec.json"), "--dir", str(tmp_path / "run")]
    assert main([*words, "--placement", str(tmp_path / "placement.json")] if name == "placement" else words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_placement_that_is_not_there_is_not_passed_over(tmp_path, tiny_spec, capsys):
    (tmp_path / "spec.json").write_text(to_json(tiny_spec("discrete-raster")))
    words = [str(tmp_path / "spec.json"), "--dir", str(tmp_path / "run"), "--placement", str(tmp_path / "none.json")]
    assert main(words) == 2
    assert "none.json: no such file" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_failure_leaves_its_reason(tmp_path, tiny_spec):
    spec = tiny_spec("discrete-raster")
    strange = dataclasses.replace(spec, tokenizer_sha256="00" * 32)
    with pytest.raises(InvalidInput):
        run(strange, tmp_path / strange.id, OFTEN)
    status = RunFolder(tmp_path / strange.id).status
    assert status["state"] == "failed" and "InvalidInput" in status["error"]


@pytest.mark.parametrize(
    ("data", "evaluate", "message"),
    [
        ({"world": {"classes": ("dog", "cat", "bus")}}, {"geneval_images_per_prompt": 1}, "does not know 'dog'"),
        ({"world": {"colors": ("red", "white")}}, {"geneval_images_per_prompt": 1}, "unknown color 'white'"),
        ({"name": "mine"}, {"geneval_images_per_prompt": 1}, "mine-detector"),
        ({"name": "mine"}, {"fd_images": 8}, "mine-features"),
    ],
)
def test_what_a_worlds_judges_cannot_judge_is_not_trained(tmp_path, tiny_spec, data, evaluate, message):
    spec = tiny_spec("discrete-raster")
    world = dataclasses.replace(spec.data.world, **data.get("world", {}))
    mine = dataclasses.replace(spec.data, world=world, name=data.get("name", spec.data.name))
    spec = dataclasses.replace(spec, data=mine, evaluate=dataclasses.replace(spec.evaluate, **evaluate))
    with pytest.raises(InvalidInput, match=message):
        run(spec, tmp_path / spec.id, OFTEN)
    folder = RunFolder(tmp_path / spec.id)
    assert folder.status["state"] == "failed" and not folder.metrics.exists()


@pytest.mark.parametrize(
    ("model", "world", "message"),
    [
        ({"grid": 3}, {}, "tokenizer's grid 4, the run has 3"),
        ({"vocab_size": 512}, {}, "tokenizer's codes 1024, the run has 512"),
        (
            {},
            {"resolution": 64},
            "tokenizer's resolution 32, the run has 64; name a tokenizer of the world's resolution",
        ),
    ],
)
def test_a_model_or_a_world_that_is_not_its_tokenizers_is_refused(tmp_path, tiny_spec, model, world, message):
    spec = tiny_spec("discrete-raster")
    data = dataclasses.replace(spec.data, world=dataclasses.replace(spec.data.world, **world))
    spec = dataclasses.replace(spec, data=data, model=dataclasses.replace(spec.model, **model))
    with pytest.raises(InvalidInput, match=message):
        run(spec, tmp_path / spec.id, OFTEN)
    assert not RunFolder(tmp_path / spec.id).metrics.exists()


def test_trained_weights_load_and_corrupt_ones_are_refused(tmp_path, tiny_spec):
    spec = tiny_spec("discrete-raster")
    run(spec, tmp_path / spec.id, OFTEN)
    loaded, model = load_trained(tmp_path / spec.id)
    assert loaded == spec and not model.training
    assert trunk_checkpoint(trunk_folder(tmp_path, spec.trunk_id), spec.train.branch_step).exists()
    path = RunFolder(tmp_path / spec.id).weights
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidInput, match="does not load"):
        load_trained(tmp_path / spec.id)
