"""LPIPS, the perceptual distance of image pairs (Zhang et al., 1801.03924, version 0.1).

The backbone is torchvision's AlexNet or VGG16, whose weights a user gives; its layers are laid out here since LPIPS
needs no more of torchvision than that. The calibrated heads are those that torchmetrics carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from asdm_compress.evaluation.weights import check_shapes, read_weights

FILE_NAME: Final = "alexnet-owt-7be5be79.pth"
# Mean and deviation that the heads were calibrated with, for images in [-1, 1].
_SHIFT: Final = (-0.030, -0.088, -0.188)
_SCALE: Final = (0.458, 0.448, 0.450)


@dataclass(frozen=True, slots=True)
class _Backbone:
    """A backbone's layers, with torchvision's numbers; after `taps` its features are taken."""

    head: str
    layers: tuple[nn.Module, ...]
    taps: tuple[int, ...]


def _alexnet() -> _Backbone:
    layers = (
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    return _Backbone("alex", layers, (1, 4, 7, 9, 11))


def _vgg16() -> _Backbone:
    layers: list[nn.Module] = []
    taps: list[int] = []
    width = 3
    for level, (channels, convolutions) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if level:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            width = channels
        taps.append(len(layers) - 1)
    return _Backbone("vgg", tuple(layers), tuple(taps))


class Lpips(nn.Module):
    """Pairs of images (B, 3, H, W) in [0, 1] to their distances (B,)."""

    def __init__(self, backbone: _Backbone, heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.name, self.taps = backbone.head, backbone.taps
        self.features = nn.Sequential(*backbone.layers)
        for level in range(len(backbone.taps)):
            self.register_buffer(f"head{level}", heads[f"lin{level}.model.1.weight"].float(), persistent=False)
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The sum over levels of the weighted squared difference of unit features, its mean over places."""
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x = torch.cat([(2 * images - 1 - shift) / scale for images in (first, second)])
        total = torch.zeros(len(first), device=x.device)
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                apart = (unit[: len(first)] - unit[len(first) :]).square()
                head = self.get_buffer(f"head{self.taps.index(number)}")
                total = total + (apart * head).sum(1).mean((1, 2))
        return total


def load_lpips(path: Path, device: torch.device) -> Lpips:
    """The metric on the backbone that a torchvision weights file holds; raises AsdmError for other files."""
    state = {name: value for name, value in read_weights(path).items() if name.startswith("features.")}
    first = state.get("features.0.weight")
    backbone = _vgg16() if first is not None and first.shape[-1] == 3 else _alexnet()
    with as_file(files("torchmetrics") / "functional" / "image" / "lpips_models" / f"{backbone.head}.pth") as place:
        metric = Lpips(backbone, torch.load(place, map_location="cpu", weights_only=True))
    wanted = "torchvision's AlexNet or VGG16"
    check_shapes(path, state, metric.state_dict(), wanted, f"{FILE_NAME} or vgg16-397923af.pth")
    metric.load_state_dict(state)
    return metric.to(device).eval().requires_grad_(False)
