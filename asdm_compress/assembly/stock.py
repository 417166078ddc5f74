"""Expresses as much of a plan as possible in a plain diffusers config, which any program that knows diffusers opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import PlacedEdits
from asdm_compress.core.edits import DROP, Edit
from asdm_compress.models import signatures
from asdm_compress.models.sites import modules_of

# Config entries that may hold one value per level.
_PER_LEVEL: Final = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)


@dataclass(frozen=True, slots=True)
class StockParts:
    """A plain config, the edits left over in the student's numbering, and the way back to the teacher's names.

    `renamed` holds, per student module path that differs, the teacher's path.
    """

    config: Mapping[str, Any]
    edits: Mapping[str, Edit]
    renamed: Mapping[str, str] = field(default_factory=dict)

    def teacher_key(self, student_key: str) -> str:
        """The teacher's name of a student's tensor."""
        parts = student_key.split(".")
        for length in range(len(parts), 0, -1):
            head = ".".join(parts[:length])
            if head in self.renamed:
                return ".".join([self.renamed[head], *parts[length:]])
        return student_key


def own_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """A UNet's config as the base class takes it."""
    return signatures.own_config(unet, UNet2DConditionModel)


def fold_into_config(unet: UNet2DConditionModel, placed: PlacedEdits, folds_layers: bool = True) -> StockParts:
    """Fold removed levels, the mid block, whole layers and levels without attention into the config.

    A layer of the encoder folds with one of the decoder when the skip connections that stay are the ones that a smaller
    stock UNet would pass. That is a rule; `stock_check` decides.
    """
    config = own_config(unet)
    levels = len(unet.down_blocks)
    keep = placed.keep_levels or levels
    keep_levels(config, levels, keep)
    edits = _fold_mid(config, placed)
    renamed: dict[str, str] = {}
    depths = []
    down_types, up_types = list(config["down_block_types"]), list(config["up_block_types"])
    for level in range(keep):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        student_up = keep - 1 - level
        down_kept, up_kept = _layers_that_stay(unet, placed.units, down, up, folds_layers)
        depths.append(len(down_kept))
        for path, student_path, kept, types, index in (
            (down, down, down_kept, down_types, level),
            (up, f"up_blocks.{student_up}", up_kept, up_types, student_up),
        ):
            moved = _renumber(placed.units, path, student_path, kept)
            attentions = [f"{student_path}.attentions.{new}" for new in range(len(kept))]
            if all(moved.get(site) == DROP for site in attentions):
                types[index] = types[index].removeprefix("CrossAttn")
                moved = {site: edit for site, edit in moved.items() if site not in attentions}
            edits |= moved
            renamed |= _renaming(unet, path, student_path, kept)
    config["down_block_types"], config["up_block_types"] = tuple(down_types), tuple(up_types)
    config["layers_per_block"] = depths[0] if len(set(depths)) == 1 else tuple(depths)
    renamed = {student: teacher for student, teacher in renamed.items() if student != teacher}
    return StockParts(config, edits, renamed)


def keep_levels(config: dict[str, Any], levels: int, keep: int) -> None:
    """Leave the first `keep` of so many levels in the config of a UNet or a ControlNet, which has no decoder."""
    if keep == levels:
        return
    for key in _PER_LEVEL:
        if isinstance(config.get(key), (list, tuple)):
            config[key] = tuple(config[key][:keep])
    if "up_block_types" in config:
        config["up_block_types"] = tuple(config["up_block_types"][levels - keep :])


def _fold_mid(config: dict[str, Any], placed: PlacedEdits) -> dict[str, Edit]:
    """Set the mid block's type; the mid block's edits that it does not cover."""
    mid = {path: edit for path, edit in placed.units.items() if path.startswith("mid_block.")}
    dropped = {path for path, edit in mid.items() if edit == DROP}
    second_layer = {"mid_block.attentions.0", "mid_block.resnets.1"}
    if placed.drop_mid or dropped == second_layer | {"mid_block.resnets.0"}:
        config["mid_block_type"] = None
        return {}
    if dropped == second_layer == mid.keys():
        config["mid_block_type"] = "UNetMidBlock2D"
        return {}
    return mid


def _layers_that_stay(
    unet: UNet2DConditionModel, edits: Mapping[str, Edit], down: str, up: str, folds_layers: bool
) -> tuple[list[int], list[int]]:
    """The layers of one level's two blocks after folding; all of them where the level does not fold."""
    down_kept, up_kept = _kept_layers(unet, edits, down), _kept_layers(unet, edits, up)
    down_all = list(range(len(unet.get_submodule(down).resnets)))
    if folds_layers and _folds(len(down_all), down_kept, up_kept):
        return down_kept, up_kept
    return down_all, list(range(len(unet.get_submodule(up).resnets)))


def _kept_layers(unet: UNet2DConditionModel, edits: Mapping[str, Edit], path: str) -> list[int]:
    """The layers of a block of which anything stays."""
    block = unet.get_submodule(path)
    attentions = len(modules_of(block, "attentions"))
    return [
        j
        for j in range(len(modules_of(block, "resnets")))
        if edits.get(f"{path}.resnets.{j}") != DROP or (j < attentions and edits.get(f"{path}.attentions.{j}") != DROP)
    ]


def _folds(depth: int, down_kept: Sequence[int], up_kept: Sequence[int]) -> bool:
    """Whether the kept decoder layers get the skips that a stock UNet of this level's new depth would give them.

    Encoder layer j pushes the output of the last kept layer up to j, or, before any, the level's input (here -1).
    Decoder layers take these outputs from the newest back, and the level's input last.
    """
    if not down_kept or len(up_kept) != len(down_kept) + 1:
        return False
    pushed = [max((k for k in down_kept if k <= j), default=-1) for j in range(depth)]
    taken = [*reversed(pushed), -1]
    return [taken[j] for j in up_kept] == [*reversed(down_kept), -1]


def _renumber(edits: Mapping[str, Edit], path: str, student_path: str, kept: Sequence[int]) -> dict[str, Edit]:
    """The edits at one block with the student's block and layer numbers; those of folded layers are gone."""
    result: dict[str, Edit] = {}
    for site, edit in edits.items():
        if not site.startswith(f"{path}."):
            continue
        name, index, *rest = site.removeprefix(f"{path}.").split(".")
        if name in ("resnets", "attentions"):
            if int(index) not in kept:
                continue
            index = str(kept.index(int(index)))
        result[".".join([student_path, name, index, *rest])] = edit
    return result


def _renaming(unet: UNet2DConditionModel, path: str, student_path: str, kept: Sequence[int]) -> dict[str, str]:
    block = unet.get_submodule(path)
    renamed = {student_path: path}
    for name in ("resnets", "attentions"):
        for new, old in enumerate(kept):
            if old < len(modules_of(block, name)):
                renamed[f"{student_path}.{name}.{new}"] = f"{path}.{name}.{old}"
    return renamed
