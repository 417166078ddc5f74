"""Draws scenes as anti-aliased images from signed distance functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from asdm_compress.scenes.world import IMAGE_SIZE, MAX_OBJECTS, Scene

RGB: Final = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.98, 0.86, 0.10),
    "purple": (0.52, 0.12, 0.66),
    "orange": (0.98, 0.52, 0.06),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
    "grey": (0.55, 0.55, 0.55),
    "pink": (0.98, 0.68, 0.78),
}


def draw_scenes(scenes: Sequence[Scene], image_size: int = IMAGE_SIZE) -> Tensor:
    """Images (B, 3, image_size, image_size), float32 in [0, 1]."""
    canvas = torch.tensor([RGB[s.background] for s in scenes])[:, :, None, None]
    canvas = canvas.repeat(1, 1, image_size, image_size)
    scale = image_size / IMAGE_SIZE
    axis = (torch.arange(image_size) + 0.5) / scale
    for slot in range(MAX_OBJECTS):
        for shape, distance in _DISTANCES.items():
            rows = [i for i, s in enumerate(scenes) if len(s.objects) > slot and s.objects[slot].shape == shape]
            if not rows:
                continue
            items = [scenes[i].objects[slot] for i in rows]
            x = axis[None, None, :] - torch.tensor([o.centre_x for o in items])[:, None, None]
            y = axis[None, :, None] - torch.tensor([o.centre_y for o in items])[:, None, None]
            radius = torch.tensor([o.radius for o in items])[:, None, None]
            coverage = (0.5 - distance(x, y, radius) * scale).clamp(0, 1)[:, None]
            paint = torch.tensor([RGB[o.colour] for o in items])[:, :, None, None]
            canvas[rows] = torch.lerp(canvas[rows], paint.expand(-1, -1, image_size, image_size), coverage)
    return canvas


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9 * radius


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    # Equilateral, pointing up: below the two slanted sides, above the base.
    slanted = 0.5 * 3**0.5 * x.abs() - 0.5 * y - 0.5 * radius
    return torch.maximum(slanted, y - 0.75 * radius)


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    long, thin = radius, 0.32 * radius
    upright = torch.maximum(x.abs() - thin, y.abs() - long)
    level = torch.maximum(x.abs() - long, y.abs() - thin)
    return torch.minimum(upright, level)


def _ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75 * radius).abs() - 0.25 * radius


_DISTANCES: Final[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}
