"""The menu: what one step of a calibrated schedule may do, and which features each choice computes anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.inheritance.actions import Action, Inherit, cut, features_of, graph_for, skip
from asdm_compress.inheritance.forecast import HOLD, LINEAR, Forecast
from asdm_compress.inheritance.graph import PREDICTION, Graph
from asdm_compress.inheritance.places import Feature, find_places
from asdm_compress.inheritance.program import Program, is_fresh, program_of
from asdm_compress.inheritance.timeline import Timeline

WHOLE: Final = -1  # the number of the choice that inherits nothing
Kind = tuple[int, bool]  # what decides a step's time: the light action, and whether one guidance branch is left out
DAMPED: Final = Forecast(1, "index", 0.5)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step does: light action `light` of a menu by `forecast`, or `WHOLE`.

    `conditional` leaves the branch without the prompt out; its difference to the other is forecast by `difference`.
    """

    light: int = WHOLE
    conditional: bool = False
    forecast: Forecast = HOLD
    difference: Forecast = HOLD

    @property
    def kind(self) -> Kind:
        """What its time depends on."""
        return self.light, self.conditional


EVERYTHING: Final = Choice()


@dataclass(frozen=True, slots=True)
class Menu:
    """Light actions of a UNet, and the forecasts that a step may take for each.

    `programs` are what each action leaves to compute; `refreshes[b][a]` says whether a step that does `b` computes all
    that `a` takes. The last row of it is that of a step that computes everything.
    """

    graph: Graph
    lights: tuple[Action, ...]
    programs: tuple[Program, ...]
    refreshes: tuple[tuple[bool, ...], ...]
    forecasts: tuple[Forecast, ...]
    guided: bool

    def action(self, choice: Choice) -> Action:
        """The run time's action for a choice."""
        inherits: tuple[Inherit, ...] = ()
        if choice.light != WHOLE:
            inherits = tuple(replace(e, forecast=choice.forecast) for e in self.lights[choice.light].inherits)
        return Action(inherits, choice.difference if choice.conditional else None)

    def choices(self) -> tuple[Choice, ...]:
        """Everything that a step may do."""
        lights = range(len(self.lights))
        found = [EVERYTHING, *(Choice(light, False, forecast) for light in lights for forecast in self.forecasts)]
        if self.guided:
            found += [Choice(WHOLE, True, HOLD, difference) for difference in self.forecasts]
            found += [
                Choice(light, True, forecast, difference)
                for light in lights
                if self.computes(light)
                for forecast in self.forecasts
                for difference in self.forecasts
            ]
        return tuple(found)

    def kinds(self) -> tuple[Kind, ...]:
        """Everything that differs in time."""
        return tuple(dict.fromkeys(choice.kind for choice in self.choices()))

    def denoises(self, light: int) -> bool:
        """Whether a light action inherits the denoised latent."""
        return any(entry.thing == "denoised" for entry in self.lights[light].inherits)

    def computes(self, light: int) -> bool:
        """Whether a light action computes anything; a skipped step does not."""
        return light == WHOLE or self.programs[light].computes

    def example(self, kind: Kind) -> Action:
        """An action of a kind, for timing: forecasts are linear, which takes the longest."""
        light, conditional = kind
        return self.action(Choice(light, conditional, LINEAR, LINEAR))

    def only(self, lights: Sequence[int]) -> Menu:
        """The menu of some of the light actions."""
        rows = (*lights, len(self.lights))
        return replace(
            self,
            lights=tuple(self.lights[i] for i in lights),
            programs=tuple(self.programs[i] for i in lights),
            refreshes=tuple(tuple(self.refreshes[b][a] for a in lights) for b in rows),
        )


def default_lights(unet: UNet2DConditionModel, timeline: Timeline) -> tuple[Action, ...]:
    """What schedules are made of: the whole prediction, every cut, and all transformers' residual branches together.

    Of the whole prediction also the denoised latent, where the sampler tells it.
    """
    places = find_places(unet)
    cuts = [cut(int(p.path.removeprefix("cut."))) for p in places.values() if p.level == "cut"]
    units = [p.path for p in places.values() if p.level == "unit" and "attentions" in p.path and p.branches]
    transformers = [Action(tuple(Inherit(path, "branch") for path in units))] if units else []
    skips = (skip(), skip(thing="denoised")) if timeline.tells_denoised else (skip(),)
    return (*skips, *cuts, *transformers)


def default_forecasts(timeline: Timeline) -> tuple[Forecast, ...]:
    """The forecasts that a step may choose from; those over the noise level only where the sampler tells it."""
    over_noise = (Forecast(1, "log-snr"),) if timeline.sigmas is not None else ()
    return (HOLD, DAMPED, LINEAR, *over_noise)


def menu_of(unet: UNet2DConditionModel, lights: Iterable[Action], forecasts: Sequence[Forecast], guided: bool) -> Menu:
    """The menu of these light actions; raises AsdmError for places that the UNet does not have."""
    places, chosen = find_places(unet), tuple(lights)
    graph = graph_for(unet, places, chosen)
    programs = tuple(program_of(graph, tuple(features_of(action, places))) for action in chosen)
    rows = [_refreshed(graph, program, programs) for program in (*programs, program_of(graph))]
    return Menu(graph, chosen, programs, tuple(rows), tuple(forecasts), guided)


def with_corrections(actions: Sequence[Action]) -> tuple[Action, ...]:
    """The actions with a correction at every cut that they inherit."""
    return tuple(
        replace(action, inherits=tuple(replace(e, corrected=e.place.startswith("cut.")) for e in action.inherits))
        for action in actions
    )


def kind_of(menu: Menu, action: Action) -> Kind:
    """The kind of an action of a menu, whatever its forecasts; raises KeyError for one that it does not have."""
    light = WHOLE if not action.inherits else _light_of(menu, action)
    return light, action.guidance is not None


def choice_of(menu: Menu, action: Action) -> Choice | None:
    """The choice that makes an action, without its corrections; None where the menu has none."""
    try:
        light, conditional = kind_of(menu, action)
    except KeyError:
        return None
    forecasts = {entry.forecast for entry in action.inherits} or {HOLD}
    if len(forecasts) > 1:
        return None
    return Choice(light, conditional, forecasts.pop(), action.guidance or HOLD)


def _light_of(menu: Menu, action: Action) -> int:
    places = [(entry.place, entry.thing) for entry in action.inherits]
    for number, light in enumerate(menu.lights):
        if [(entry.place, entry.thing) for entry in light.inherits] == places:
            return number
    raise KeyError(action.name)


def cut_sources(unet: UNet2DConditionModel) -> dict[str, str]:
    """The cuts of a UNet, and the values that corrections of what is inherited there look at."""
    places = find_places(unet)
    return {path: place.source for path, place in places.items() if place.level == "cut" and place.source is not None}


def light_name(menu: Menu, light: int) -> str:
    """For tables and plots, for example `cut.2`, `skip`, `16 units`."""
    if light == WHOLE:
        return "everything"
    first, *others = menu.lights[light].inherits
    if others:
        return f"{1 + len(others)} units"
    if first.place == PREDICTION:
        return "skip" if first.thing == "output" else f"skip.{first.thing}"
    return first.place


def _refreshed(graph: Graph, program: Program, others: Sequence[Program]) -> tuple[bool, ...]:
    live, taken = {op.value for op in program.ops}, {feature.value for feature in program.taken}
    return tuple(_all_fresh(other.taken, graph, live, taken) for other in others)


def _all_fresh(wanted: Sequence[Feature], graph: Graph, live: set[str], taken: set[str]) -> bool:
    return all(is_fresh(feature, graph, live, taken) for feature in wanted)
