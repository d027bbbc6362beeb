"""Models larger than a host's memory: built without values, which are drawn later, one parameter at a time.

A model's constructor fills its parameters from torch's global generator. Built on the meta device it fills nothing, but
says in which order it would have; repeating that gives every parameter the values of a model built at once, bit for
bit, while no more than one of them is whole anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fluidscale.model.build import FluidModel, build
from fluidscale.spec import ModelSpec

# What fills a tensor whole, whatever was in it.
_FILLS = {getattr(torch.ops.aten, name).default for name in ("uniform_", "normal_", "zero_")}
_FILLS.add(torch.ops.aten.fill_.Scalar)


@dataclass(frozen=True)
class Fill:
    """One filling of one parameter, in the constructor's order."""

    name: str
    shape: torch.Size
    operation: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            self.seen.append((args[0], func, tuple(args[1:]), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def build_without_values(spec: ModelSpec) -> tuple[FluidModel, list[Fill]]:
    """A model on the meta device, and what would have filled its parameters."""
    with torch.device("meta"), _Recorder() as recorder:
        model = build(spec)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fills = [
        Fill(names[id(tensor)], tensor.shape, func, arguments, options)
        for tensor, func, arguments, options in recorder.seen
        if id(tensor) in names
    ]
    if unfilled := set(names.values()) - {fill.name for fill in fills}:
        raise RuntimeError(f"not known how {', '.join(sorted(unfilled))} would be filled: add the operation to _FILLS")
    return model, fills


@torch.no_grad()
def draw_values(model: nn.Module, fills: list[Fill]) -> None:
    """Gives every parameter its values from torch's global CPU generator; each process keeps its part."""
    parameters = dict(model.named_parameters())
    for fill in fills:
        whole = torch.empty(fill.shape)
        fill.operation(whole, *fill.arguments, **fill.options)
        _keep(parameters[fill.name], whole)


def _keep(parameter: Tensor, whole: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    # Every process has drawn the same values, so that none has to send any.
    part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())
