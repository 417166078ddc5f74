"""A UNet as a drawing in text: its levels from top to bottom, encoder left and decoder right, with what a plan does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import LEVELS, Plan, level_modules, place
from asdm_compress.core.edits import EXACT, Edit, conv_spec, kept_share
from asdm_compress.models.sites import modules_of

LEGEND: Final = (
    "R ResNet  A transformer  v downsampler  ^ upsampler\n"
    ". taken out  c convolution  n narrowed  - in part  s the same function in less time"
)
_MARKS: Final = {"resnets": "R", "attentions": "A", "downsamplers": "v", "upsamplers": "^"}


def draw_unet(unet: UNet2DConditionModel, plan: Plan) -> str:
    """One line per level and one for the mid block. Raises AsdmError for a plan that does not fit the UNet."""
    placed = place(unet, plan)
    gone = {module for site in plan.edits if site.startswith(LEVELS) for module in level_modules(unet, site)}
    if placed.drop_mid:
        gone.add("mid_block")
    count = len(unet.down_blocks)
    lines = []
    width = 0
    for level in range(count):
        left = _block(unet, f"down_blocks.{level}", placed.units, gone)
        right = _block(unet, f"up_blocks.{count - 1 - level}", placed.units, gone)
        lines.append((f"level {level}", "  " * level + left, right))
        width = max(width, len(lines[-1][1]))
    middle = "" if unet.mid_block is None else _block(unet, "mid_block", placed.units, gone)
    text = [f"{name:8}{left:{width}}   {right}" for name, left, right in lines]
    return "\n".join([*text, f"{'mid':8}{'  ' * count}{middle}", "", LEGEND])


def _block(unet: UNet2DConditionModel, path: str, units: Mapping[str, Edit], gone: set[str]) -> str:
    """The units of a block in the order in which they run, one letter each, layers apart."""
    block = unet.get_submodule(path)
    resnets, attentions = modules_of(block, "resnets"), modules_of(block, "attentions")
    shift = 1 if path == "mid_block" else 0  # its first ResNet stands alone
    layers = []
    for j in range(len(resnets)):
        layer = [("resnets", j)]
        if 0 <= j - shift < len(attentions) and attentions[j - shift] is not None:
            attention = ("attentions", j - shift)
            layer = [attention, *layer] if shift else [*layer, attention]
        layers.append(layer)
    layers += [[(kind, 0)] for kind in ("downsamplers", "upsamplers") if modules_of(block, kind)]
    return " ".join("".join(_mark(path, kind, j, units, gone) for kind, j in layer) for layer in layers)


def _mark(block: str, kind: str, number: int, units: Mapping[str, Edit], gone: set[str]) -> str:
    path = f"{block}.{kind}.{number}"
    if block in gone or path in gone:
        return "."
    edit = units.get(path)
    if edit is None:
        return "-" if any(other.startswith(f"{path}.") for other in units) else _MARKS[kind]
    if conv_spec(edit) is not None:
        return "c"
    if edit in EXACT:
        return "s"
    return "n" if kept_share(edit) is not None else "-" if edit == "shortcut" else "."
