"""Models that are built without values: the same values later, and never more than one parameter whole."""

from __future__ import annotations

import pytest
import torch
from processes import together
from tiny_models import ARMS, POSITIONS, arm_spec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluidscale.model.build import build
from fluidscale.model.deferred import build_without_values, draw_values
from fluidscale.train.sharding import shard, whole


class Largest(TorchDispatchMode):
    """Notes the most bytes of real memory that one tensor took."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("arm", ARMS)
def test_values_drawn_later_are_those_drawn_at_once(arm, position):
    spec = arm_spec(arm, position)
    torch.manual_seed(3)
    straight, after = build(spec), torch.rand(1)
    model, fills = build_without_values(spec)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    draw_values(model, fills)
    assert torch.equal(after, torch.rand(1))
    for (name, one), (same, other) in zip(straight.named_parameters(), model.named_parameters(), strict=True):
        assert name == same and torch.equal(one, other), name


def sharded(spec):
    """In each process: largest tensor, bytes kept, and the values gathered, of a model drawn after sharding."""
    torch.distributed.init_process_group("gloo")
    largest = Largest()
    with largest:
        model, fills = build_without_values(spec)
        shard(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), torch.float32)
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        draw_values(model, fills)
    kept = sum(parameter.to_local().nbytes for parameter in model.parameters())
    values = {name: whole(parameter).numpy() for name, parameter in model.named_parameters()}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return largest.bytes, kept, values


@pytest.mark.parametrize("arm", ["continuous-random", "discrete-raster"])
def test_no_process_holds_more_than_its_part_and_one_whole_parameter(arm):
    spec = arm_spec(arm)
    torch.manual_seed(3)
    straight = {name: parameter.detach() for name, parameter in build(spec).named_parameters()}
    everything = sum(parameter.nbytes for parameter in straight.values())
    for largest, kept, values in together(2, sharded, spec):
        assert largest <= max(parameter.nbytes for parameter in straight.values()) < 0.2 * everything
        assert kept == pytest.approx(0.5 * everything, rel=0.02)
        assert values.keys() == straight.keys()
        for name, parameter in straight.items():
            assert torch.equal(torch.from_numpy(values[name]), parameter), name


def test_a_new_way_to_fill_a_parameter_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", lambda weight: weight.detach().exponential_())
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, a: weight)
    with pytest.raises(RuntimeError, match="add the operation"):
        build_without_values(arm_spec("discrete-raster"))
