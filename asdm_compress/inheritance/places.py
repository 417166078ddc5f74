"""Places: what of a UNet can be inherited, at every level, as the features that have to be carried for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.graph import PREDICTION, Graph, Op, graph_of, parts_of
from asdm_compress.models.sites import Site, find_sites
from asdm_compress.models.slots import ConvResnet

Level = Literal["block", "layer", "unit", "sub-unit", "cut", "step"]
# `denoised` is of the whole prediction: the latent that it makes of the UNet's input.
Thing = Literal["output", "branch", "denoised"]
_SHORTCUT: Final = "conv_shortcut"


@dataclass(frozen=True, slots=True)
class Feature:
    """One tensor that can be carried from step to step: a value, or what it is over the shortcut of the op `over`.

    Of a UNet with several members it is that of one of them, by name; the whole prediction means the same in all.
    """

    value: str
    over: str | None = None
    member: str | None = None

    @property
    def name(self) -> str:
        """For files and messages; within one member's pass, and at one step of a run, no other feature has it."""
        return self.value if self.over is None else f"{self.value} over {self.over}"

    def of(self, member: str | None) -> Feature:
        """The same of a member."""
        return self if self.value == PREDICTION or member is None else replace(self, member=member)


@dataclass(frozen=True, slots=True)
class Place:
    """A place and what inheriting it takes: `outputs` the values that leave it, `branches` the same over its input.

    `branches` is None where input and output differ in size. `source` is the value whose own forecast error tells how
    wrong a forecast of this place is: the skip connection that a cut joins, the input of a branch.
    """

    path: str
    level: Level
    outputs: tuple[Feature, ...]
    branches: tuple[Feature, ...] | None
    source: str | None = None

    def features(self, thing: Thing) -> tuple[Feature, ...]:
        """What is carried for inheriting `thing`; raises AsdmError where the place has no residual branch, and for the
        denoised latent of anything but the whole prediction."""
        if thing == "denoised" and self.path != PREDICTION:
            raise AsdmError(f"{self.path} makes no denoised latent", "Inherit its output.")
        found = self.branches if thing == "branch" else self.outputs
        if found is None:
            raise AsdmError(
                f"{self.path} has no residual branch: its input and its output differ in size",
                "Inherit its output.",
            )
        return found


def find_places(unet: UNet2DConditionModel) -> dict[str, Place]:
    """All places of a UNet by path, outer ones before what is inside of them."""
    graph = graph_of(unet)
    found = {f"cut.{b}": _cut(graph, f"cut.{b}") for b in range(len(graph.skip_of))}
    for site in find_sites(unet):
        for place in _places_at(unet, graph, site):
            found[place.path] = place
    found[PREDICTION] = Place(PREDICTION, "step", (Feature(PREDICTION),), None)
    return found


def place_at(places: Mapping[str, Place], path: str) -> Place:
    """The place with a path; raises AsdmError for one that this UNet does not have."""
    if path not in places:
        cuts = sum(place.level == "cut" for place in places.values())
        raise AsdmError(
            f"this UNet has no place {path!r} to inherit",
            f"It has the cuts cut.0 to cut.{cuts - 1}, and its blocks, layers, units and sub-units by their paths.",
        )
    return places[path]


def opened_for(places: Collection[Place]) -> frozenset[str]:
    """The transformers that have to be taken apart for these places."""
    return frozenset(p.path.split(".transformer_blocks.")[0] for p in places if p.level == "sub-unit")


def around(module: nn.Module, hidden: Tensor) -> Tensor:
    """What a unit's residual branch is added to: its input, or its own 1 x 1 shortcut of that."""
    if isinstance(module, ConvResnet):
        shortcut = module.around(hidden)
        assert shortcut is not None
        return shortcut
    shortcut_module = getattr(module, _SHORTCUT, None)
    if shortcut_module is not None:
        hidden = shortcut_module(hidden)
    scale = getattr(module, "output_scale_factor", 1.0)
    return hidden if scale == 1 else hidden / scale


def around_prices(path: str, module: nn.Module) -> tuple[str, ...]:
    """The module whose MACs `around` spends, if any."""
    return (f"{path}.{_SHORTCUT}",) if getattr(module, _SHORTCUT, None) is not None else ()


def _cut(graph: Graph, value: str) -> Place:
    return Place(value, "cut", (Feature(value),), None, graph.skip_of[value])


def _places_at(unet: UNet2DConditionModel, graph: Graph, site: Site) -> Iterator[Place]:
    if site.kind in ("stem", "time", "head"):
        return
    if site.level == "sub-unit":
        yield from _sub_unit(unet, site)
        return
    inside = [op for op in graph.ops if op.kind == "unit" and _belongs(op.value, site)]
    if any(_has_weights(op) for op in inside):
        exits = _exits(graph, inside)
        entry = inside[0]
        outputs = tuple(Feature(value) for value in exits)
        samplers = any(op.step is not None and op.step.kind in ("downsampler", "upsampler") for op in inside)
        if samplers or not _has_shortcut(entry):
            yield Place(site.path, site.level, outputs, None)
        else:
            branches = tuple(Feature(value, entry.value) for value in exits)
            yield Place(site.path, site.level, outputs, branches, entry.inputs[0])


def _sub_unit(unet: UNet2DConditionModel, site: Site) -> Iterator[Place]:
    if site.kind not in ("self-attention", "cross-attention", "feed-forward"):
        return
    path = site.path.split(".transformer_blocks.")[0]
    transformer = unet.get_submodule(path)
    for value, _, _ in parts_of(path, transformer):
        if value == site.path:
            yield Place(value, "sub-unit", (Feature(f"{value}+"),), (Feature(value),))


def _belongs(value: str, site: Site) -> bool:
    return any(value == module or value.startswith(f"{module}.") for module in site.modules)


def _exits(graph: Graph, inside: list[Op]) -> list[str]:
    """The values made inside that somebody outside uses, in order."""
    own = {op.value for op in inside}
    used = {value for op in graph.ops if op.value not in own for value in op.inputs}
    return [op.value for op in inside if op.value in used]


def _has_weights(op: Op) -> bool:
    """Whether there is anything to save: modules that an edit has left may have no weights but their shortcut's."""
    return any(
        not name.startswith(_SHORTCUT) for module in op.modules if module for name, _ in module.named_parameters()
    )


def _has_shortcut(op: Op) -> bool:
    """Whether the unit adds something to (a projection of) its input."""
    module = op.modules[0]
    if isinstance(module, ConvResnet):
        return module.adds_input or module.conv_shortcut is not None
    if op.step is not None and op.step.kind == "transformer":
        return True
    channels = (getattr(module, "in_channels", None), getattr(module, "out_channels", 0))
    return getattr(module, _SHORTCUT, None) is not None or channels[0] == channels[1]
