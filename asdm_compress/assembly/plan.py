"""A plan: one edit per chosen site, and what that means for the modules of a given UNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.core.edits import DROP, SHARED, Edit, conv_spec, kept_share
from asdm_compress.core.errors import AsdmError, SiteError
from asdm_compress.models.edits import (
    SlotWeights,
    check_edit,
    edited_copy,
    legal_edits,
    removable_levels,
    slot_kernels,
)
from asdm_compress.models.sites import Site, find_sites
from asdm_compress.models.widths import inner_at

LEVELS: Final = "levels."  # `levels.3`: level 3 and everything deeper, with the downsampler that leads there


@dataclass(frozen=True, slots=True)
class Plan:
    """Site paths, at any level of detail, with the edit at each; no two of them overlap."""

    edits: Mapping[str, Edit] = field(default_factory=dict)

    @property
    def unshared(self) -> Plan:
        """The same without what only computes both guidance branches at once: its weights and errors are the same."""
        return Plan({site: edit for site, edit in self.edits.items() if edit != SHARED})


@dataclass(frozen=True, slots=True)
class PlacedEdits:
    """A plan in terms of modules: edits of units and sub-units, whether the mid block goes, how many levels stay.

    `replaced` gives every unit with a convolution the modules, in the order in which they ran, that it stands for.
    """

    units: Mapping[str, Edit]
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drop_mid: bool = False
    keep_levels: int | None = None

    @property
    def bearers(self) -> tuple[str, ...]:
        """The units that have convolutions in their places."""
        return tuple(self.replaced)

    def edited_path(self, unet: UNet2DConditionModel, path: str) -> str:
        """Where the module at a path of `unet` stands in the edited one: removed levels move the decoder's blocks."""
        if self.keep_levels is None or not path.startswith("up_blocks."):
            return path
        blocks, number, *rest = path.split(".", 2)  # a block's own path has two parts
        return ".".join([blocks, str(int(number) - (len(unet.up_blocks) - self.keep_levels)), *rest])


def check_teacher(unet: UNet2DConditionModel) -> None:
    """Raise AsdmError for an assembled student, whose slots cannot be cut again, and for a switched UNet."""
    if unet.config.get("members"):
        raise AsdmError("this UNet is itself switched between members", "Give the teacher among them.")
    if unet.config.get("edits"):
        raise AsdmError("this UNet is itself an assembled student", "Give its teacher, and one plan for both cuts.")


def place(unet: UNet2DConditionModel, plan: Plan) -> PlacedEdits:
    """Resolve a plan against a UNet.

    Raises SiteError for a site that the UNet does not have, an edit that is not possible there, and edits that overlap.
    """
    check_teacher(unet)
    sites = {site.path: site for site in find_sites(unet)}
    legal, kernels = legal_edits(unet), slot_kernels(unet)
    taken: dict[str, str] = {}
    units: dict[str, Edit] = {}
    replaced: dict[str, tuple[str, ...]] = {}
    drop_mid, keep_levels = False, None
    for path, edit in plan.edits.items():
        with _about(path):
            is_conv = conv_spec(edit) is not None
            for atom in atoms(unet, path, sites):
                if atom in taken:
                    raise AsdmError(f"the edits at {taken[atom]} and {path} overlap at {atom}", "Keep one of them.")
                taken[atom] = path
            if path.startswith(LEVELS):
                keep_levels = _level(unet, path)
            elif path == "mid_block" and edit == DROP:
                drop_mid = True
            if path.startswith(LEVELS) or (path == "mid_block" and not is_conv):
                if edit != DROP:
                    raise AsdmError(f"the edit {edit!r} is not possible at {path}", "Possible there: drop.")
                continue
            chosen = _unit_edits(unet, sites[path], edit, legal)
            for unit, unit_edit in chosen.items():
                check_edit(unit, unit_edit, legal.get(unit, ()), kernels.get(unit, ()), inner_at(unet, unit))
            units |= chosen
            if is_conv:
                unit = next(unit for unit, unit_edit in chosen.items() if unit_edit == edit)
                replaced[unit] = tuple(chosen)
    return PlacedEdits(units, replaced, drop_mid or keep_levels is not None, keep_levels)


@contextmanager
def _about(site: str) -> Iterator[None]:
    """Errors say of which site they are."""
    try:
        yield
    except AsdmError as error:
        raise SiteError(site, error) from error


def edited(unet: UNet2DConditionModel, plan: Plan, slot_weights: SlotWeights | None = None) -> UNet2DConditionModel:
    """The UNet with the plan applied, sharing every remaining tensor with the original.

    Convolutions whose weights are not given are zero, narrowed modules keep their largest structures.
    """
    placed = place(unet, plan)
    return edited_copy(unet, placed.units, placed.drop_mid, placed.keep_levels, slot_weights)


def atoms(unet: UNet2DConditionModel, path: str, sites: Mapping[str, Site]) -> frozenset[str]:
    """The smallest sites that an edit at `path` touches: ResNets, samplers, and the sub-units of transformers."""
    if path.startswith(LEVELS):
        *blocks, downsampler = level_modules(unet, path)
        return frozenset().union(*(atoms(unet, block, sites) for block in blocks)) | {downsampler}
    if path not in sites:
        raise AsdmError(f"this UNet has no site {path!r}", "See `asdm-compress profile` for its sites.")
    if sites[path].kind in ("resnet", "downsampler", "upsampler"):
        return frozenset({path})
    children = [s.path for s in sites.values() if s.parent == path]
    if not children:
        return frozenset({path})
    return frozenset().union(*(atoms(unet, child, sites) for child in children))


def level_modules(unet: UNet2DConditionModel, path: str) -> tuple[str, ...]:
    """The modules that go with a level and everything deeper: the blocks, and last the downsampler that leads there.

    Raises AsdmError for a level that cannot be removed.
    """
    keep, count = _level(unet, path), len(unet.down_blocks)
    down, up = range(keep, count), range(count - keep)
    middle = () if unet.mid_block is None else ("mid_block",)
    blocks = (*(f"down_blocks.{i}" for i in down), *middle, *(f"up_blocks.{i}" for i in up))
    return (*blocks, f"down_blocks.{keep - 1}.downsamplers.0")


def _level(unet: UNet2DConditionModel, path: str) -> int:
    possible = removable_levels(unet)
    number = path.removeprefix(LEVELS)
    if not number.isdigit() or int(number) not in possible:
        names = ", ".join(f"{LEVELS}{n}" for n in possible) or "none"
        raise AsdmError(f"{path} cannot be removed from this UNet", f"Levels that can: {names}.")
    return int(number)


def _unit_edits(
    unet: UNet2DConditionModel, site: Site, edit: Edit, legal: Mapping[str, tuple[Edit, ...]]
) -> dict[str, Edit]:
    """The edits of units, in the order in which these run, that an edit of a unit or of more stands for.

    Of several units, one ResNet gets the edit and the others are dropped.
    """
    if site.path in legal:
        return {site.path: edit}
    if kept_share(edit) is not None:
        raise AsdmError(
            f"the {site.kind} {site.path} cannot be narrowed", "Its ResNets, attentions and feed-forwards can."
        )
    if edit == SHARED:
        raise AsdmError(f"the {site.kind} {site.path} cannot be shared", "Its ResNets and self-attentions may be.")
    if site.level == "layer":
        paths = site.modules
    elif site.kind == "mid":
        paths = _mid_units(unet)
    else:
        raise AsdmError(f"the {site.kind} {site.path} cannot be edited", "Units, sub-units, layers and levels can.")
    bearer = next(path for path in paths if ".resnets." in path)
    return {path: edit if path == bearer else DROP for path in paths}


def _mid_units(unet: UNet2DConditionModel) -> tuple[str, ...]:
    return tuple(path for site in find_sites(unet) if site.parent == "mid_block" for path in site.modules)
