"""The architecture of a UNet, read off the names and shapes of its tensors, in diffusers' naming or the LDM layout.

A config can be missing or stale; the weights cannot. The structure of a Stable Diffusion UNet is all in its names: how
many ResNets a level has, whether transformers follow them, whether there is a mid block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Shapes = Mapping[str, Sequence[int]]

CROSS_DOWN: Final = "CrossAttnDownBlock2D"
CROSS_UP: Final = "CrossAttnUpBlock2D"
PLAIN_DOWN: Final = "DownBlock2D"
PLAIN_UP: Final = "UpBlock2D"
CROSS_MID: Final = "UNetMidBlock2DCrossAttn"
PLAIN_MID: Final = "UNetMidBlock2D"
# The keys of a config that say which blocks there are.
STRUCTURE: Final = ("down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block")

_LDM_MARK: Final = "input_blocks.0.0.weight"
_DIFFUSERS_MARK: Final = "conv_in.weight"
_HEADS_SD1: Final = 8
_HEAD_WIDTH_SD2: Final = 64
# Text width -> number of heads, or None where heads have one width everywhere.
_TEXT_WIDTHS: Final[Mapping[int, int | None]] = {768: _HEADS_SD1, 1024: None}


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution level of one side: its ResNets, whether transformers follow them, its channels."""

    resnets: int
    has_attention: bool
    width: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """A UNet's structure; `up` in the order of the forward pass, deepest level first."""

    in_channels: int
    out_channels: int
    down: tuple[Level, ...]
    mid_resnets: int
    mid_has_attention: bool
    up: tuple[Level, ...]
    text_width: int | None
    linear_projection: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level, the encoder's order. The decoder tells them: it has a ResNet on every level."""
        return tuple(level.width or 0 for level in reversed(self.up))

    def describe(self) -> str:
        """In words, for a message."""
        mid = "no mid block" if not self.mid_resnets else "a mid block"
        counts = "-".join(str(level.resnets) for level in self.down)
        return f"{len(self.down)} levels with {counts} layers, {mid}"


def is_ldm(shapes: Shapes) -> bool:
    """Whether names (without the prefix) are those of the original code."""
    return _LDM_MARK in shapes


def read_layout(shapes: Shapes) -> Layout | None:
    """The structure of the UNet with these tensors; None where there is none, or none of this kind.

    `shapes` are those of the UNet alone, without a prefix.
    """
    if is_ldm(shapes):
        return _read_ldm(shapes)
    return _read_diffusers(shapes) if _DIFFUSERS_MARK in shapes else None


def config_of(layout: Layout) -> dict[str, Any]:
    """The part of diffusers' config that the weights tell.

    Heads are not among that; Stable Diffusion's own rule is taken for its two text widths: 8 per attention in 1.x, of
    width 64 in 2.x. Of another text width `attention_head_dim` is left out.
    """
    counts = tuple(level.resnets for level in layout.down)
    mid = (CROSS_MID if layout.mid_has_attention else PLAIN_MID) if layout.mid_resnets else None
    config: dict[str, Any] = {
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "down_block_types": tuple(CROSS_DOWN if level.has_attention else PLAIN_DOWN for level in layout.down),
        "mid_block_type": mid,
        "up_block_types": tuple(CROSS_UP if level.has_attention else PLAIN_UP for level in layout.up),
        "block_out_channels": layout.widths,
        "layers_per_block": counts[0] if len(set(counts)) == 1 else counts,
        "use_linear_projection": layout.linear_projection,
    }
    if layout.text_width is not None:
        config["cross_attention_dim"] = layout.text_width
    if layout.text_width is not None and layout.text_width in _TEXT_WIDTHS:
        heads = _TEXT_WIDTHS[layout.text_width]
        by_level = tuple(max(width // _HEAD_WIDTH_SD2, 1) for width in layout.widths)
        config["attention_head_dim"] = by_level if heads is None else heads
    return config


def known_text_widths() -> tuple[int, ...]:
    """The widths of Stable Diffusion 1.x's and 2.x's text encoders."""
    return tuple(_TEXT_WIDTHS)


def _read_diffusers(shapes: Shapes) -> Layout | None:
    sides = {}
    for side in ("down", "up"):
        levels = []
        for i in _numbers(shapes, rf"{side}_blocks\.(\d+)\."):
            path = f"{side}_blocks.{i}"
            resnets = _numbers(shapes, rf"{re.escape(path)}\.resnets\.(\d+)\.")
            width = shapes.get(f"{path}.resnets.0.conv1.weight", (None,))[0]
            levels.append(Level(len(resnets), _any(shapes, f"{path}.attentions."), width))
        sides[side] = tuple(levels)
    mid = len(_numbers(shapes, r"mid_block\.resnets\.(\d+)\."))
    return _whole(shapes, sides["down"], sides["up"], mid, _any(shapes, "mid_block.attentions."), "conv_in", "conv_out")


def _read_ldm(shapes: Shapes) -> Layout | None:
    down: list[Level] = [Level(0, False, None)]
    for i in _numbers(shapes, r"input_blocks\.(\d+)\.")[1:]:
        path = f"input_blocks.{i}"
        if f"{path}.0.op.weight" in shapes:
            down.append(Level(0, False, None))
        else:
            down[-1] = _longer(down[-1], shapes, path)
    up: list[Level] = [Level(0, False, None)]
    numbers = _numbers(shapes, r"output_blocks\.(\d+)\.")
    for i in numbers:
        path = f"output_blocks.{i}"
        up[-1] = _longer(up[-1], shapes, path)
        if any(f"{path}.{place}.conv.weight" in shapes for place in (1, 2)) and i != numbers[-1]:
            up.append(Level(0, False, None))
    places = _numbers(shapes, r"middle_block\.(\d+)\.")
    mid = sum(f"middle_block.{i}.in_layers.2.weight" in shapes for i in places)
    attends = any(_any(shapes, f"middle_block.{i}.transformer_blocks.") for i in places)
    return _whole(shapes, tuple(down), tuple(up), mid, attends, "input_blocks.0.0", "out.2")


def _longer(level: Level, shapes: Shapes, path: str) -> Level:
    """A level with the block at `path` added, which in names with gaps may be an upsampler alone."""
    if f"{path}.0.in_layers.2.weight" not in shapes:
        return level
    attends = level.has_attention or _any(shapes, f"{path}.1.transformer_blocks.")
    return Level(level.resnets + 1, attends, shapes[f"{path}.0.in_layers.2.weight"][0])


def _whole(
    shapes: Shapes, down: tuple[Level, ...], up: tuple[Level, ...], mid: int, mid_attends: bool, first: str, last: str
) -> Layout | None:
    if f"{first}.weight" not in shapes or f"{last}.weight" not in shapes or not up or len(down) != len(up):
        return None
    if any(level.width is None for level in up):
        return None
    texts = {shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")}
    projections = [shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")]
    if len(texts) > 1:
        return None
    return Layout(
        shapes[f"{first}.weight"][1],
        shapes[f"{last}.weight"][0],
        down,
        mid,
        mid_attends,
        up,
        next(iter(texts), None),
        bool(projections) and len(projections[0]) == 2,
    )


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    matches = (re.match(pattern, name) for name in shapes)
    return sorted({int(match[1]) for match in matches if match})


def _any(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)
