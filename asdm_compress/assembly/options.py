"""Every edit that a search may choose, with the exact costs that it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import LEVELS, Plan, atoms, place
from asdm_compress.core.edits import EXACT, SHARED, ConvSpec, Edit, Routing, conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.units import Limit, Resource
from asdm_compress.models.edits import edited_copy, legal_edits, removable_levels
from asdm_compress.models.sites import Site, find_sites
from asdm_compress.models.tree import meta_copy
from asdm_compress.profiling.profile import Profile, SiteProfile
from asdm_compress.profiling.slot_costs import SlotCosts, as_run

Finest = Literal["sub-unit", "unit"]
SlotChoice = Literal["auto", "all", "1x1", "3x3", "separable", "none"]
# Kernel size, and whether it is depthwise-separable. `auto` spares the time that separable ones take to be fitted.
SLOT_SHAPES: Final[Mapping[str, tuple[tuple[int, bool], ...]]] = {
    "auto": ((1, False), (3, False)),
    "all": ((1, False), (3, True), (3, False)),
    "1x1": ((1, False),),
    "3x3": ((3, False),),
    "separable": ((3, True),),
    "none": (),
}
LEAST_SAVING: Final = 0.1  # of a place's latency: less is what two profiles of the same module differ by
STANDARD_ERROR: Final = 0.93  # of a median, times the square root of the samples: this many interquartile ranges


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


def slot_specs(slot: SlotChoice, experts: int, routing: Routing, limits: Sequence[Limit]) -> tuple[ConvSpec, ...]:
    """The convolutions that a search may put into a slot: the routed one of each shape, and one with a single expert.

    The latter except where it costs no less: beside timestep-routed ones, unless a budget limits parameters. Raises
    AsdmError for unknown words.
    """
    if slot not in SLOT_SHAPES:
        raise AsdmError(f"unknown slot {slot!r}", f"Slots: {', '.join(SLOT_SHAPES)}.")
    if routing not in get_args(Routing):
        raise AsdmError(f"unknown routing {routing!r}", f"Routings: {', '.join(get_args(Routing))}.")
    routed = experts > 1 and routing != "none"
    plain_too = not routed or routing != "timestep" or any(limit.resource == "params" for limit in limits)
    specs = []
    for kernel, separable in SLOT_SHAPES[slot]:
        if plain_too:
            specs.append(ConvSpec(kernel, separable))
        if routed:
            specs.append(ConvSpec(kernel, separable, None, experts, routing))
    return tuple(specs)


def find_options(
    unet: UNet2DConditionModel,
    profile: Profile,
    places: Mapping[Edit, Sequence[str]] | None = None,
    slots: SlotCosts | None = None,
) -> tuple[Option, ...]:
    """All legal edits of units, sub-units, layers, the mid block and whole levels that save something.

    `places` are the edits that put something into a place and where (see `profiling.slot_costs.places_of`), `slots`
    what they cost there. A convolution may replace a whole layer and the mid block too.
    """
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
    on_meta = meta_copy(unet)
    for path, bearer, edit in _replacements(unet, sites, places or {}):
        assert slots is not None
        there = slots[as_run(edit)][bearer]
        parameters = there.parameters if edit == as_run(edit) else _slot_parameters(on_meta, bearer, edit)
        savings = {
            "latency": _told_apart(costs[path], there),
            "macs": costs[path].macs - there.macs,
            "params": costs[path].parameters - parameters,
        }
        if any(value > 0 for value in savings.values()):
            found.append(Option(path, edit, atoms(unet, path, sites), savings))
    return tuple(found)


def check_finest(name: str) -> None:
    """Raise AsdmError unless `name` is a size of parts."""
    if name not in get_args(Finest):
        raise AsdmError(f"unknown size of parts {name!r}", f"Use {', '.join(get_args(Finest))}.")


def is_coarse_enough(site: str, edit: Edit, finest: Finest) -> bool:
    """Whether a place is no smaller than the smallest parts that may be edited; what is only shared is never cut."""
    return finest == "sub-unit" or edit == SHARED or ".transformer_blocks." not in site


def useful_options(options: Sequence[Option], limits: Sequence[Limit]) -> tuple[Option, ...]:
    """Those that save something of what is limited."""
    return tuple(o for o in options if any(o.savings[limit.resource] > 0 for limit in limits))


def _replacements(
    unet: UNet2DConditionModel, sites: Mapping[str, Site], places: Mapping[Edit, Sequence[str]]
) -> Iterator[tuple[str, str, Edit]]:
    """Site, the unit or sub-unit that would bear what is put there, and the edit."""
    wider: dict[str, list[str]] = {}
    for site in sites.values():
        if (site.level == "layer" and len(site.modules) > 1) or site.kind == "mid":
            bearer = place(unet, Plan({site.path: ConvSpec().name})).bearers[0]
            wider.setdefault(bearer, []).append(site.path)
    for edit, paths in places.items():
        for path in paths:
            yield path, path, edit
            if conv_spec(edit) is not None:
                yield from ((site, path, edit) for site in wider.get(path, ()))


def _told_apart(before: SiteProfile, after: SiteProfile) -> float:
    """Seconds saved, or 0 for so few that they may be noise: a search would pick what noise has favoured."""
    saved = before.latency - after.latency
    spread = [(STANDARD_ERROR * site.latency_iqr) ** 2 / len(site.latency_samples) for site in (before, after)]
    return saved if abs(saved) > max(2 * sum(spread) ** 0.5, LEAST_SAVING * before.latency) else 0.0


def _slot_parameters(on_meta: UNet2DConditionModel, bearer: str, edit: Edit) -> int:
    twin = edited_copy(on_meta, {bearer: edit})
    return sum(p.numel() for p in twin.get_submodule(bearer).parameters())


def _candidates(
    unet: UNet2DConditionModel, sites: Mapping[str, Site]
) -> Iterator[tuple[str, Edit, list[str], list[str]]]:
    """Site, edit, sites whose costs go, and sites of which a part stays."""
    legal = legal_edits(unet)
    for path, edits in legal.items():
        for edit in edits:
            if edit in EXACT:
                continue  # nothing goes
            # What remains of an upsampler without its convolution is the interpolation.
            going = f"{path}.conv" if ".upsamplers." in path else path
            yield path, edit, [going], _what_stays(path, edit, sites)
    for site in sites.values():
        # A layer of one unit is that unit.
        if site.level != "layer" or len(site.modules) == 1:
            continue
        resnet = next(path for path in site.modules if ".resnets." in path)
        for edit in legal[resnet]:
            if edit in EXACT:
                continue  # which is no edit of the rest of the layer
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
