"""FID's own Inception: TensorFlow's network of 2015 with its quirks, from torch-fidelity's weights file.

Not torchvision's: average pools leave the padding out, the last block pools by maximum, and 256 px are stretched to 299
by TensorFlow 1's bilinear rule, which has neither antialiasing nor half-pixel centres. Each quirk moves FID. Source:
torch-fidelity's feature_extractor_inceptionv3 and the file pt_inception-2015-12-05-6726825d.pth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluidscale.evaluate.judges.pretrained import file_sha256
from fluidscale.spec import InvalidInput

SIDE, WIDTH, LABELS = 299, 2048, 1008
BATCH = 64

# What a path may name beside its convolutions; a tuple in a path stands for two side by side.
_POOLS = ("average", "maximum", "halved")


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Paths side by side, their channels joined in order."""

    def __init__(self, layers: dict[str, tuple], paths: tuple[tuple, ...]) -> None:
        super().__init__()
        self.paths = paths
        for name, layer in layers.items():
            self.add_module(name, Convolution(*layer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._path(path, x) for path in self.paths], dim=1)

    def _path(self, path: tuple, x: Tensor) -> Tensor:
        for step in path:
            if isinstance(step, tuple):
                x = torch.cat([self.get_submodule(name)(x) for name in step], dim=1)
            else:
                x = _pool(step, x) if step in _POOLS else self.get_submodule(step)(x)
        return x


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=2) if kind == "halved" else F.max_pool2d(x, 3, stride=1, padding=1)


def _five(inputs: int, pooled: int) -> Mixed:
    layers = {
        "branch1x1": (inputs, 64),
        "branch5x5_1": (inputs, 48),
        "branch5x5_2": (48, 64, 5, 1, 2),
        "branch3x3dbl_1": (inputs, 64),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 1, 1),
        "branch_pool": (inputs, pooled),
    }
    double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    return Mixed(layers, (("branch1x1",), ("branch5x5_1", "branch5x5_2"), double, ("average", "branch_pool")))


def _halving(inputs: int) -> Mixed:
    layers = {
        "branch3x3": (inputs, 384, 3, 2),
        "branch3x3dbl_1": (inputs, 64),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 2),
    }
    return Mixed(layers, (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ("halved",)))


def _seven(inputs: int, width: int) -> Mixed:
    wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    layers = {
        "branch1x1": (inputs, 192),
        "branch7x7_1": (inputs, width),
        "branch7x7_2": (width, width, *wide),
        "branch7x7_3": (width, 192, *tall),
        "branch7x7dbl_1": (inputs, width),
        "branch7x7dbl_2": (width, width, *tall),
        "branch7x7dbl_3": (width, width, *wide),
        "branch7x7dbl_4": (width, width, *tall),
        "branch7x7dbl_5": (width, 192, *wide),
        "branch_pool": (inputs, 192),
    }
    once = tuple(f"branch7x7_{k}" for k in range(1, 4))
    twice = tuple(f"branch7x7dbl_{k}" for k in range(1, 6))
    return Mixed(layers, (("branch1x1",), once, twice, ("average", "branch_pool")))


def _halving_late(inputs: int) -> Mixed:
    layers = {
        "branch3x3_1": (inputs, 192),
        "branch3x3_2": (192, 320, 3, 2),
        "branch7x7x3_1": (inputs, 192),
        "branch7x7x3_2": (192, 192, (1, 7), 1, (0, 3)),
        "branch7x7x3_3": (192, 192, (7, 1), 1, (3, 0)),
        "branch7x7x3_4": (192, 192, 3, 2),
    }
    long = tuple(f"branch7x7x3_{k}" for k in range(1, 5))
    return Mixed(layers, (("branch3x3_1", "branch3x3_2"), long, ("halved",)))


def _forked(inputs: int, pool: str) -> Mixed:
    wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    layers = {
        "branch1x1": (inputs, 320),
        "branch3x3_1": (inputs, 384),
        "branch3x3_2a": (384, 384, *wide),
        "branch3x3_2b": (384, 384, *tall),
        "branch3x3dbl_1": (inputs, 448),
        "branch3x3dbl_2": (448, 384, 3, 1, 1),
        "branch3x3dbl_3a": (384, 384, *wide),
        "branch3x3dbl_3b": (384, 384, *tall),
        "branch_pool": (inputs, 192),
    }
    once = ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b"))
    twice = ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b"))
    return Mixed(layers, (("branch1x1",), once, twice, (pool, "branch_pool")))


class Inception(nn.Module):
    """uint8-valued pixels (B, 3, H, W) -> the pooled layer (B, 2048). Names are those of the weights file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _five(192, 32), _five(256, 64), _five(288, 64)
        self.Mixed_6a = _halving(288)
        self.Mixed_6b, self.Mixed_6c = _seven(768, 128), _seven(768, 160)
        self.Mixed_6d, self.Mixed_6e = _seven(768, 160), _seven(768, 192)
        self.Mixed_7a = _halving_late(768)
        self.Mixed_7b, self.Mixed_7c = _forked(1280, "average"), _forked(2048, "maximum")
        self.fc = nn.Linear(WIDTH, LABELS)  # in the file; not used for features

    def forward(self, pixels: Tensor) -> Tensor:
        x = (stretched(pixels.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_pool("halved", x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_pool("halved", x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def stretched(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's resize_bilinear to (side, side): source = target x scale, with neither half-pixels nor blur."""
    for axis in (2, 3):
        place = torch.arange(side, device=x.device, dtype=torch.float32) * (x.shape[axis] / side)
        low = place.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = side
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), (place - low).view(shape))
    return x


class InceptionFeatures:
    """uint8 (B, H, W, 3) -> float32 (B, 2048); `sha256` names the weights file."""

    name, width = "inception", WIDTH

    def __init__(self, network: Inception, sha256: str, device: torch.device) -> None:
        self.network, self.sha256, self.device = network.to(device).eval().requires_grad_(False), sha256, device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH])).to(self.device)
            parts.append(self.network(pixels.movedim(-1, 1)).float().cpu().numpy())
        return np.concatenate(parts)


def load_inception(path: Path, device: torch.device | str = "cpu") -> InceptionFeatures:
    """From torch-fidelity's file of plain tensors. Raises InvalidInput when it is missing or another network's."""
    sha256 = file_sha256(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInput(f"{path}: not a file of plain tensors ({str(error).splitlines()[0]})") from error
    network = Inception()
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{path}: not FID's Inception in torch-fidelity's format ({' '.join(str(error).split())[:160]})"
        ) from error
    return InceptionFeatures(network, sha256, torch.device(device))
