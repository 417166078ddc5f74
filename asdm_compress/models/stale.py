"""Configs that are not those of their weights, as published students carry them: the weights say what they really are.

Segmind's small-sd and tiny-sd lie beside the config of the model that they were cut from. diffusers would fill what the
config has and the weights lack with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.models.files import choose_weights
from asdm_compress.models.layout import CROSS_MID, STRUCTURE, Layout, config_of, read_layout
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.streaming import reading

# Published students by their UNets' parameters (BK-SDM's cards, and counted); Segmind's have BK-SDM's architectures.
STUDENTS: Final[Mapping[int, str]] = {
    579_384_964: "BK-SDM-Base and Segmind small-sd",
    482_346_884: "BK-SDM-Small",
    323_384_964: "BK-SDM-Tiny and Segmind tiny-sd",
    583_480_964: "BK-SDM-v2-Base",
    485_787_524: "BK-SDM-v2-Small",
    326_825_604: "BK-SDM-v2-Tiny",
}
_STOCK_BLOCKS: Final = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}


def true_config(
    folder: Path, config: Mapping[str, Any], allow_pickle: bool = False
) -> tuple[dict[str, Any], str] | None:
    """The config that fits the weights of a UNet folder, and what to say of it; None where its own does, or none does.

    Only names and shapes are read, and a config is given only where every one of them then fits. Raises AsdmError for
    damaged files.
    """
    blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if config.get("_class_name") != UNet2DConditionModel.__name__ or not blocks <= _STOCK_BLOCKS:
        return None
    if not choose_weights(path.name for path in folder.iterdir())[0]:
        return None  # opening the folder says so
    with reading(folder, allow_pickle) as reader:
        shapes = reader.shapes
    layout = read_layout(shapes)
    if layout is None:
        return None
    found = config_of(layout)
    stale = [key for key in STRUCTURE if _plain(config, key) != _plain(found, key)]
    if not stale:
        return None
    corrected = {k: v for k, v in config.items() if not k.startswith("_")}
    corrected |= {key: found[key] for key in STRUCTURE}
    corrected["attention_head_dim"] = _heads(config, layout)
    if not _fits(corrected, shapes):
        return None
    return corrected, _note(folder, layout, stale, shapes)


def student_name(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The published students that have as many parameters as these tensors."""
    return STUDENTS.get(sum(torch.Size(shape).numel() for shape in shapes.values()))


def _note(folder: Path, layout: Layout, stale: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    name = student_name(shapes)
    known = f", those of {name}" if name else ""
    return (
        f"{folder / 'config.json'} is not that of the weights beside it ({', '.join(stale)}): the UNet is read as what "
        f"the weights are, {layout.describe()}{known}"
    )


def _plain(config: Mapping[str, Any], key: str) -> Any:
    """A value in one form: lists for tuples, one number per level, diffusers' own default."""
    value = config.get(key)
    if key == "mid_block_type" and key not in config:
        return CROSS_MID
    if key == "layers_per_block" and isinstance(value, int):
        return [value] * len(config["down_block_types"])
    return list(value) if isinstance(value, (list, tuple)) else value


def _heads(config: Mapping[str, Any], layout: Layout) -> Any:
    """The number of heads of each remaining level, by the level's width in the stale config."""
    heads = config.get("attention_head_dim", 8)
    if not isinstance(heads, (list, tuple)):
        return heads
    by_width = dict(zip(config["block_out_channels"], heads, strict=True))
    return tuple(by_width.get(width, heads[-1]) for width in layout.widths)


def _fits(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        with quiet_libraries(), torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(config))
    except (ValueError, TypeError, RuntimeError):
        return False
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()} == dict(shapes)
