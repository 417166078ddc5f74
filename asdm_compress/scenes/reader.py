"""The scene reader: a small network that reads shapes, colours, sizes, places and background back from pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from asdm_compress.scenes.captions import Caption, SeenObject, SeenScene, holds
from asdm_compress.scenes.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES

STRIDE: Final = 8
CELLS: Final = IMAGE_SIZE // STRIDE
# Channels of the dense output: is a centre here; which shape, colour and size; where in the cell (x, y), in pixels.
DENSE_PARTS: Final = (1, len(SHAPES), len(COLOURS), len(SIZES), 2)
FEATURES: Final = 128
CENTRE_THRESHOLD: Final = 0.45
WEIGHTS: Final = Path(__file__).with_name("reader.safetensors")


class SceneReader(nn.Module):
    """Images (B, 3, 128, 128) in [0, 1] to dense object logits (B, 18, 16, 16) and background logits (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 16, stride=2),
            _conv(16, 32, stride=2),
            _conv(32, 64, stride=2),
            _conv(64, 64),
            _conv(64, 64, dilation=2),
            _conv(64, 64),
        )
        self.dense = nn.Conv2d(64, sum(DENSE_PARTS), 1)
        self.background = nn.Linear(FEATURES, len(BACKGROUNDS))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The feature map (B, 64, 16, 16), and its means and deviations over the image (B, 128)."""
        maps = self.trunk(images - 0.5)
        return maps, torch.cat([maps.mean(dim=(2, 3)), maps.std(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Dense logits and background logits."""
        maps, pooled = self.features(images)
        return self.dense(maps), self.background(pooled)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[SeenScene]:
        """What stands in each image (B, 3, 128, 128) in [0, 1]."""
        dense, background = self(images)
        centre, shape, colour, size, offset = dense.split(DENSE_PARTS, dim=1)
        heat = centre.sigmoid()
        peaks = (heat == F.max_pool2d(heat, 5, stride=1, padding=2)) & (heat > CENTRE_THRESHOLD)
        found: list[list[SeenObject]] = [[] for _ in images]
        for b, row, column in peaks[:, 0].nonzero().tolist():
            dx, dy = offset[b, :, row, column].tolist()
            found[b].append(
                SeenObject(
                    shape=SHAPES[int(shape[b, :, row, column].argmax())],
                    colour=COLOURS[int(colour[b, :, row, column].argmax())],
                    size=SIZES[int(size[b, :, row, column].argmax())],
                    centre_x=STRIDE * (column + 0.5) + dx,
                    centre_y=STRIDE * (row + 0.5) + dy,
                )
            )
        names = [BACKGROUNDS[i] for i in background.argmax(1).tolist()]
        return [SeenScene(name, tuple(objects)) for name, objects in zip(names, found, strict=True)]

    def accuracy(self, images: Tensor, captions: Sequence[Caption]) -> list[bool]:
        """For every image, whether it shows exactly what its caption claims."""
        seen = [scene for part in torch.split(images, 64) for scene in self.read(part)]
        return [holds(caption, scene) for caption, scene in zip(captions, seen, strict=True)]


def load_reader() -> SceneReader:
    """The bundled, trained reader, in evaluation mode."""
    reader = SceneReader().eval().requires_grad_(False)
    reader.load_state_dict(load_file(WEIGHTS))
    return reader


def _conv(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
