"""The Inception network of FID, KID and the inception score, from a weights file of torch-fidelity or pytorch-fid.

The network is that of TensorFlow's 2015-12-05 graph (Szegedy et al., 1512.00567, as ported by these two projects): its
parts have the names of their weights files, which hold one set of tensors. It is defined here, as data, since both
packages import torchvision, which a fidelity figure does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asdm_compress.evaluation.weights import check_shapes, read_weights

INPUT_SIZE: Final = 299
FEATURES: Final = 2048
CLASSES: Final = 1008
# As torch-fidelity publishes it; pytorch-fid's has the prefix pt_.
FILE_NAME: Final = "weights-inception-2015-12-05-6726825d.pth"

Size = int | tuple[int, int]
# A convolution: its name, channels out, kernel, stride; always padded to keep the size, except where the stride is 2.
Convolution = tuple[str, int, Size, int]
Pool = Literal["average", "max", "max/2"]
# What is done one after the other in a path through a block, each step one convolution or two side by side.
Steps = list[tuple[Convolution, ...]]
# A block: its paths, how it pools, and the channels of the convolution behind the pool, 0 for none.
Layout = tuple[list[Steps], Pool, int]

_ROW: Final = (1, 7)
_COLUMN: Final = (7, 1)


def _line(*convolutions: Convolution) -> Steps:
    return [(one,) for one in convolutions]


def _a(pool: int) -> Layout:
    paths = [
        _line(("branch1x1", 64, 1, 1)),
        _line(("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)),
        _line(("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)),
    ]
    return paths, "average", pool


def _c(inner: int) -> Layout:
    paths = [
        _line(("branch1x1", 192, 1, 1)),
        _line(("branch7x7_1", inner, 1, 1), ("branch7x7_2", inner, _ROW, 1), ("branch7x7_3", 192, _COLUMN, 1)),
        _line(
            ("branch7x7dbl_1", inner, 1, 1),
            ("branch7x7dbl_2", inner, _COLUMN, 1),
            ("branch7x7dbl_3", inner, _ROW, 1),
            ("branch7x7dbl_4", inner, _COLUMN, 1),
            ("branch7x7dbl_5", 192, _ROW, 1),
        ),
    ]
    return paths, "average", 192


def _e(pool: Pool) -> Layout:
    paths: list[Steps] = [
        _line(("branch1x1", 320, 1, 1)),
        [(("branch3x3_1", 384, 1, 1),), (("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1))],
        [
            (("branch3x3dbl_1", 448, 1, 1),),
            (("branch3x3dbl_2", 384, 3, 1),),
            (("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)),
        ],
    ]
    return paths, pool, 192


_B: Final[Layout] = (
    [
        _line(("branch3x3", 384, 3, 2)),
        _line(("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)),
    ],
    "max/2",
    0,
)
_D: Final[Layout] = (
    [
        _line(("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)),
        _line(
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, _ROW, 1),
            ("branch7x7x3_3", 192, _COLUMN, 1),
            ("branch7x7x3_4", 192, 3, 2),
        ),
    ],
    "max/2",
    0,
)
# Channels in, then the block; after the stem, in order. The last block alone pools by maximum.
_BLOCKS: Final[Mapping[str, tuple[int, Layout]]] = {
    "Mixed_5b": (192, _a(32)),
    "Mixed_5c": (256, _a(64)),
    "Mixed_5d": (288, _a(64)),
    "Mixed_6a": (288, _B),
    "Mixed_6b": (768, _c(128)),
    "Mixed_6c": (768, _c(160)),
    "Mixed_6d": (768, _c(160)),
    "Mixed_6e": (768, _c(192)),
    "Mixed_7a": (768, _D),
    "Mixed_7b": (1280, _e("average")),
    "Mixed_7c": (2048, _e("max")),
}


class _Convolution(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel: Size, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
        keeps = pad and stride == 1
        padding = (sizes[0] // 2, sizes[1] // 2) if keeps else (0, 0)
        self.conv = nn.Conv2d(channels_in, channels_out, sizes, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    def __init__(self, channels: int, layout: Layout) -> None:
        super().__init__()
        paths, self.pool, pool_channels = layout
        self.paths: list[list[tuple[str, ...]]] = []
        for path in paths:
            width = channels
            for step in path:
                for name, out, kernel, stride in step:
                    self.add_module(name, _Convolution(width, out, kernel, stride))
                width = step[0][1]
            self.paths.append([tuple(name for name, *_ in step) for step in path])
        if pool_channels:
            self.branch_pool = _Convolution(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for path in self.paths:
            here = [x]
            for names in path:
                here = [self.get_submodule(name)(here[0]) for name in names]
            found += here
        if self.pool == "max/2":
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*found, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Images (B, 3, H, W), uint8, to features (B, 2048) and the logits of the inception score (B, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, pad=False)
        for name, (channels, layout) in _BLOCKS.items():
            self.add_module(name, _Block(channels, layout))
        self.fc = nn.Linear(FEATURES, CLASSES)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and logits without their bias, as torch-fidelity's inception score takes them."""
        x = (resize_as_tensorflow(images.to(self.fc.weight.dtype), INPUT_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def resize_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear, with TensorFlow 1's places: output pixel i takes input place i · in / out, without half a pixel."""
    for dimension in (2, 3):
        length = images.shape[dimension]
        places = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = places.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (places - low).reshape([-1 if d == dimension else 1 for d in range(4)])
        first, second = images.index_select(dimension, low), images.index_select(dimension, high)
        images = first + (second - first) * share
    return images


def load_inception(path: Path, device: torch.device) -> Inception:
    """The network with the weights of a file; raises AsdmError for one that is not this network's."""
    with torch.device("meta"):
        network = Inception()
    state = read_weights(path)
    check_shapes(path, state, network.state_dict(), "the Inception network of FID", FILE_NAME)
    counters = {name: torch.zeros((), dtype=torch.long) for name in network.state_dict() if name not in state}
    network.load_state_dict({**counters, **state}, assign=True)
    return network.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
