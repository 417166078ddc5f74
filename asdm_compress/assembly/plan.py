"""A plan: one edit per chosen site, and what that means for the modules of a given UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.edits import EDITS, Edit, edited_copy, legal_edits, removable_levels
from asdm_compress.models.sites import Site, find_sites

LEVELS: Final = "levels."  # `levels.3`: level 3 and everything deeper, with the downsampler that leads there


@dataclass(frozen=True, slots=True)
class Plan:
    """Site paths, at any level of detail, with the edit at each; no two of them overlap."""

    edits: Mapping[str, Edit] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlacedEdits:
    """A plan in terms of modules: edits of units and sub-units, whether the mid block goes, how many levels stay."""

    units: Mapping[str, Edit]
    drop_mid: bool = False
    keep_levels: int | None = None


def check_teacher(unet: UNet2DConditionModel) -> None:
    """Raise AsdmError for an assembled student, whose slots cannot be cut again."""
    if unet.config.get("edits"):
        raise AsdmError("this UNet is itself an assembled student", "Give its teacher, and one plan for both cuts.")


def place(unet: UNet2DConditionModel, plan: Plan) -> PlacedEdits:
    """Resolve a plan against a UNet.

    Raises AsdmError for a site that the UNet does not have, an edit that is not possible there, and edits that overlap.
    """
    check_teacher(unet)
    sites = {site.path: site for site in find_sites(unet)}
    legal = legal_edits(unet)
    taken: dict[str, str] = {}
    units: dict[str, Edit] = {}
    drop_mid, keep_levels = False, None
    for path, edit in plan.edits.items():
        if edit not in EDITS:
            raise AsdmError(f"unknown edit {edit!r} at {path}", f"Known edits: {', '.join(EDITS)}.")
        for atom in atoms(unet, path, sites):
            if atom in taken:
                raise AsdmError(f"the edits at {taken[atom]} and {path} overlap at {atom}", "Keep one of them.")
            taken[atom] = path
        if path.startswith(LEVELS):
            keep_levels = _level(unet, path)
        elif path == "mid_block":
            drop_mid = True
        if path.startswith(LEVELS) or path == "mid_block":
            if edit != "drop":
                raise AsdmError(f"the edit {edit!r} is not possible at {path}", "Possible there: drop.")
            continue
        units |= _unit_edits(sites[path], edit, legal)
    return PlacedEdits(units, drop_mid or keep_levels is not None, keep_levels)


def edited(unet: UNet2DConditionModel, plan: Plan) -> UNet2DConditionModel:
    """The UNet with the plan applied, sharing every remaining tensor with the original."""
    placed = place(unet, plan)
    return edited_copy(unet, placed.units, placed.drop_mid, placed.keep_levels)


def atoms(unet: UNet2DConditionModel, path: str, sites: Mapping[str, Site]) -> frozenset[str]:
    """The smallest sites that an edit at `path` touches: ResNets, samplers, and the sub-units of transformers."""
    if path.startswith(LEVELS):
        keep = _level(unet, path)
        count = len(unet.down_blocks)
        blocks = [f"down_blocks.{i}" for i in range(keep, count)] + [f"up_blocks.{i}" for i in range(count - keep)]
        if unet.mid_block is not None:
            blocks.append("mid_block")
        inside = frozenset().union(*(atoms(unet, block, sites) for block in blocks))
        return inside | {f"down_blocks.{keep - 1}.downsamplers.0"}
    if path not in sites:
        raise AsdmError(f"this UNet has no site {path!r}", "See `asdm-compress profile` for its sites.")
    if sites[path].kind in ("resnet", "downsampler", "upsampler"):
        return frozenset({path})
    children = [s.path for s in sites.values() if s.parent == path]
    if not children:
        return frozenset({path})
    return frozenset().union(*(atoms(unet, child, sites) for child in children))


def _level(unet: UNet2DConditionModel, path: str) -> int:
    possible = removable_levels(unet)
    number = path.removeprefix(LEVELS)
    if not number.isdigit() or int(number) not in possible:
        names = ", ".join(f"{LEVELS}{n}" for n in possible) or "none"
        raise AsdmError(f"{path} cannot be removed from this UNet", f"Levels that can: {names}.")
    return int(number)


def _unit_edits(site: Site, edit: Edit, legal: Mapping[str, tuple[Edit, ...]]) -> dict[str, Edit]:
    """The edits of units that an edit of a unit or of a whole layer stands for."""
    if site.path in legal:
        chosen: dict[str, Edit] = {site.path: edit}
    elif site.level == "layer":
        chosen = {path: edit if ".resnets." in path else "drop" for path in site.modules}
    else:
        raise AsdmError(f"the {site.kind} {site.path} cannot be edited", "Units, sub-units, layers and levels can.")
    for path, unit_edit in chosen.items():
        if unit_edit not in legal[path]:
            raise AsdmError(
                f"the edit {unit_edit!r} is not possible at {site.path}: the widths there differ",
                f"Possible at {path}: {', '.join(legal[path])}.",
            )
    return chosen
