"""Actions: what one step of a sampling run computes and what it inherits, in any mixture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.forecast import HOLD, Forecast
from asdm_compress.inheritance.graph import PREDICTION, Graph, graph_of
from asdm_compress.inheritance.places import Feature, Place, Thing, find_places, opened_for, place_at
from asdm_compress.inheritance.program import Program, program_of


@dataclass(frozen=True, slots=True)
class Inherit:
    """One place that is inherited: its output or its residual branch, how it is forecast, and whether a fitted
    correction is added to the forecast (see `corrections`). Of the whole prediction it may be the denoised latent, from
    which samplers of several steps extrapolate."""

    place: str
    thing: Thing = "output"
    forecast: Forecast = HOLD
    corrected: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """What a step inherits; without anything it computes the whole UNet.

    `guidance` None computes both guidance branches. Otherwise only the branch with the prompt is computed, and its
    difference to the other is forecast; without guidance there is one branch, which is then computed.

    `member` is the one that computes, of a UNet that has several (see `switching`); None is the UNet as it is.
    """

    inherits: tuple[Inherit, ...] = ()
    guidance: Forecast | None = None
    member: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it inherits nothing."""
        return not self.inherits and self.guidance is None

    @property
    def skips(self) -> bool:
        """Whether it inherits the whole prediction."""
        return any(entry.place == PREDICTION for entry in self.inherits)

    def whole(self) -> Action:
        """The action of the same member that inherits nothing."""
        return Action(member=self.member)

    @property
    def name(self) -> str:
        """For tables and files, for example `full`, `cut.0:linear`, `conditional:hold+cut.2:hold`, `full@student`."""
        parts = [] if self.guidance is None else [f"conditional:{self.guidance.name}"]
        for entry in self.inherits:
            thing = "" if entry.thing == "output" else f".{entry.thing}"
            place = "skip" if entry.place == PREDICTION else entry.place
            parts.append(f"{place}{thing}:{entry.forecast.name}{'+fit' if entry.corrected else ''}")
        return ("+".join(parts) or "full") + ("" if self.member is None else f"@{self.member}")

    def places(self, places: Mapping[str, Place]) -> Iterator[tuple[Inherit, Place]]:
        """Its places on a UNet; raises AsdmError for those that the UNet does not have."""
        for entry in self.inherits:
            yield entry, place_at(places, entry.place)


FULL: Final = Action()


def cut(branch: int, forecast: Forecast = HOLD, corrected: bool = False) -> Action:
    """Inherit everything below the decoder's layer `branch`, counted from the outside (DeepCache's shape)."""
    return Action((Inherit(f"cut.{branch}", "output", forecast, corrected),))


def inherit(paths: Iterable[str], thing: Thing = "branch", forecast: Forecast = HOLD) -> Action:
    """Inherit a set of blocks, layers, units or sub-units."""
    return Action(tuple(Inherit(path, thing, forecast) for path in paths))


def skip(forecast: Forecast = HOLD, thing: Thing = "output") -> Action:
    """Inherit the whole prediction, or the denoised latent that it makes; nothing of the UNet is computed."""
    return Action((Inherit(PREDICTION, thing, forecast),))


def conditional_only(forecast: Forecast = HOLD, also: Action = FULL) -> Action:
    """Compute only the guidance branch with the prompt, as far as `also` computes anything."""
    if also.skips:
        raise AsdmError("a step that inherits the whole prediction has no guidance branch to leave out")
    return replace(also, guidance=forecast)


def elementary_actions(unet: UNet2DConditionModel, forecast: Forecast = HOLD) -> tuple[Action, ...]:
    """All actions with one inherited place that save anything on this UNet, each with and without the unconditional
    branch; and `full`, `conditional` and `skip`.

    Any set of places of different actions makes an action too. Two places that come to the same (a layer of one unit)
    appear once.
    """
    places = find_places(unet)
    seen: set[tuple[Feature, ...]] = set()
    found: list[Action] = [FULL, skip(forecast)]
    graph = graph_of(unet, opened_for(places.values()))
    whole = _prices(program_of(graph))
    for path, place in places.items():
        things: tuple[Thing, ...] = ("output", "branch")
        for thing in things:
            if path == PREDICTION or (thing == "branch" and place.branches is None):
                continue
            features = place.features(thing)
            if features in seen:
                continue
            seen.add(features)
            if _prices(program_of(graph, features)) != whole:
                found.append(Action((Inherit(path, thing, forecast),)))
    return (*found, *(conditional_only(forecast, action) for action in found if action != skip(forecast)))


def graph_for(unet: UNet2DConditionModel, places: Mapping[str, Place], actions: Iterable[Action]) -> Graph:
    """The UNet's graph, opened as far as these actions need it; raises AsdmError for places that it does not have."""
    return graph_of(unet, opened_for([place for action in actions for _, place in action.places(places)]))


def features_of(action: Action, places: Mapping[str, Place]) -> dict[Feature, Inherit]:
    """The features that an action takes; where two of its places share one, the first says how."""
    found: dict[Feature, Inherit] = {}
    for entry, place in action.places(places):
        for feature in place.features(entry.thing):
            found.setdefault(feature.of(action.member), entry)
    return found


def correction_sources(action: Action, places: Mapping[str, Place]) -> dict[Feature, str]:
    """The features that an action corrects, and the values that their corrections look at.

    Raises AsdmError where a place has no such value: corrections are possible at cuts and for residual branches.
    """
    found: dict[Feature, str] = {}
    for entry, place in action.places(places):
        if not entry.corrected:
            continue
        if place.source is None or (place.level != "cut" and entry.thing == "output"):
            raise AsdmError(
                f"the {entry.thing} of {place.path} cannot be corrected",
                "Corrections are fitted at cuts and for residual branches of blocks, layers and units.",
            )
        found |= dict.fromkeys((f.of(action.member) for f in place.features(entry.thing)), place.source)
    return found


def _prices(program: Program) -> list[str]:
    return [path for op in program.ops for path in op.priced]
