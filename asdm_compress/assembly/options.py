"""Every edit that a search may choose, with the exact costs that it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import LEVELS, Plan, atoms
from asdm_compress.core.units import Resource
from asdm_compress.models.edits import Edit, legal_edits, removable_levels
from asdm_compress.models.sites import Site, find_sites
from asdm_compress.profiling.profile import Profile, SiteProfile


@dataclass(frozen=True, slots=True)
class Option:
    """One edit at one site: the atoms that it touches, and what it saves of each resource (seconds, MACs, parameters).

    Savings of options that do not overlap add up: exactly for MACs and parameters, nearly for latency.
    """

    site: str
    edit: Edit
    atoms: frozenset[str]
    savings: Mapping[Resource, float]

    @property
    def name(self) -> str:
        """`site:edit`."""
        return f"{self.site}:{self.edit}"

    @property
    def plan(self) -> Plan:
        """The plan of this one edit."""
        return Plan({self.site: self.edit})


def teacher_costs(profile: Profile) -> dict[Resource, float]:
    """The whole UNet's costs."""
    return {"latency": profile.latency, "macs": profile.macs, "params": profile.parameters}


def find_options(unet: UNet2DConditionModel, profile: Profile) -> tuple[Option, ...]:
    """All legal edits of units, sub-units, layers, the mid block and whole levels that save something."""
    sites = {site.path: site for site in find_sites(unet)}
    costs = {site.path: site for site in profile.sites}
    found = []
    for path, edit, saved, left in _candidates(unet, sites):
        savings: dict[Resource, float] = {
            "latency": _sum(costs, saved, "latency") - _sum(costs, left, "latency"),
            "macs": _sum(costs, saved, "macs") - _sum(costs, left, "macs"),
            "params": _sum(costs, saved, "parameters") - _sum(costs, left, "parameters"),
        }
        found.append(Option(path, edit, atoms(unet, path, sites), savings))
    return tuple(found)


def _candidates(
    unet: UNet2DConditionModel, sites: Mapping[str, Site]
) -> Iterator[tuple[str, Edit, list[str], list[str]]]:
    """Site, edit, sites whose costs go, and sites of which a part stays."""
    legal = legal_edits(unet)
    for path, edits in legal.items():
        for edit in edits:
            # What remains of an upsampler without its convolution is the interpolation.
            going = f"{path}.conv" if ".upsamplers." in path else path
            yield path, edit, [going], _what_stays(path, edit, sites)
    for site in sites.values():
        # A layer of one unit is that unit.
        if site.level != "layer" or len(site.modules) == 1:
            continue
        resnet = next(path for path in site.modules if ".resnets." in path)
        for edit in legal[resnet]:
            yield site.path, edit, [site.path], _what_stays(resnet, edit, sites)
    if unet.mid_block is not None:
        yield "mid_block", "drop", ["mid_block"], []
    count = len(unet.down_blocks)
    for keep in removable_levels(unet):
        gone = [f"down_blocks.{i}" for i in range(keep, count)] + [f"up_blocks.{i}" for i in range(count - keep)]
        gone += ["mid_block"] if unet.mid_block is not None else []
        yield f"{LEVELS}{keep}", "drop", [*gone, f"down_blocks.{keep - 1}.downsamplers.0"], []


def _what_stays(path: str, edit: Edit, sites: Mapping[str, Site]) -> list[str]:
    return [f"{path}.conv_shortcut"] if edit == "shortcut" and f"{path}.conv_shortcut" in sites else []


def _sum(costs: Mapping[str, SiteProfile], paths: list[str], what: str) -> float:
    return float(sum(getattr(costs[path], what) for path in paths))
