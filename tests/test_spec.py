import dataclasses
import json
import math

import pytest

from fluidscale import spec as spec_module
from fluidscale.limits import InvalidInput, from_dict
from fluidscale.spec import TrainSpec, canonical, digest, to_json
from fluidscale.valid import run_spec_from_json


def test_a_spec_survives_its_file(tiny_spec):
    for arm in spec_module.ARMS:
        spec = tiny_spec(arm)
        again = run_spec_from_json(to_json(spec), "file")
        assert again == spec and again.id == spec.id


def test_identity_follows_every_number_and_nothing_else(tiny_spec):
    spec = tiny_spec("continuous-random")
    changed = dataclasses.replace(spec, train=dataclasses.replace(spec.train, lr=spec.train.lr * (1 + 1e-12)))
    assert changed.id != spec.id
    # A float that YAML spelled as an integer is the same number.
    same = dataclasses.replace(spec, train=dataclasses.replace(spec.train, grad_clip=1))
    assert same.id == spec.id


def test_runs_of_several_lengths_share_a_trunk_but_not_an_id(tiny_spec):
    short, long = tiny_spec("discrete-raster", steps=24), tiny_spec("discrete-raster", steps=48, decay_steps=12)
    assert short.trunk_id == long.trunk_id and short.id != long.id
    other = tiny_spec("discrete-raster", steps=24, lr=1e-3)
    assert other.trunk_id != short.trunk_id


def test_a_field_added_later_leaves_old_ids_alone(monkeypatch):
    train = TrainSpec(1e-3, 8, 24, 6, 4, 0.0, 0.9, 0.95, 1.0, 0.99, 0.1)
    before = digest(train)

    @dataclasses.dataclass(frozen=True)
    class Extended(TrainSpec):
        new: float = 0.5

    monkeypatch.setitem(spec_module._ADDED_LATER, "Extended", {"new", *spec_module._ADDED_LATER["TrainSpec"]})
    extended = Extended(*dataclasses.astuple(train))
    assert digest(extended) == before
    assert digest(dataclasses.replace(extended, new=0.25)) != before


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, object()])
def test_a_value_without_canonical_form_is_refused(value):
    with pytest.raises(TypeError):
        canonical(value)


def test_an_unknown_key_names_the_nearest(tiny_spec):
    content = json.loads(to_json(tiny_spec("discrete-raster")))
    content["train"]["warmup_step"] = content["train"].pop("warmup_steps")
    with pytest.raises(InvalidInput, match=r"train: unknown key 'warmup_step'; did you mean 'warmup_steps'"):
        from_dict(spec_module.RunSpec, content, "spec.json")


@pytest.mark.parametrize(("key", "value"), [("lr", "fast"), ("steps", 1.5), ("batch", None), ("lr", True)])
def test_an_ill_typed_value_is_refused(tiny_spec, key, value):
    content = json.loads(to_json(tiny_spec("discrete-raster")))
    content["train"][key] = value
    with pytest.raises(InvalidInput, match=f"train: {key}"):
        from_dict(spec_module.RunSpec, content, "spec.json")


def test_three_ids_are_pinned():
    """An id that moves orphans every finished run: change these only with an entry in CHANGELOG.md."""
    from fluidscale.spec import DataSpec, DiffusionSpec, EvaluateSpec, ModelSpec, RunSpec, SamplingSpec

    train = TrainSpec(4e-3, 64, 1536, 384, 60, 0.02, 0.9, 0.95, 1.0, 0.99, 0.1)
    data = DataSpec("pictures", 98304, manifest_sha256="ab" * 32)
    head = DiffusionSpec(96, 3, "flow", 2)
    discrete = ModelSpec("discrete", "raster", 4, 96, 6, 4, 0, 1024, 32, 32, 7, 1)
    continuous = ModelSpec("continuous", "random", 4, 96, 6, 4, 16, 0, 32, 32, 7, 1, mask_law="uniform", head=head)
    sampling = EvaluateSpec(SamplingSpec(2.0, 1.0, 16), 1024, 4, 512)
    runs = [
        RunSpec("1M", 0, discrete, "cd" * 32, "words", data, train, sampling),
        RunSpec("1M", 0, continuous, "cd" * 32, "words", data, train, sampling),
        RunSpec("1M", 1, continuous, "cd" * 32, "words", data, train, sampling),
    ]
    assert [run.id for run in runs] == PINNED


PINNED = [
    "discrete-raster-1M-cc7395db11",
    "continuous-random-1M-00e27fb2ea",
    "continuous-random-1M-4f146ece85",
]
