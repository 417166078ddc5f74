"""Sites by steps: what a schedule of feature inheritance computes, holds and forecasts, part by part of the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from diffusers import UNet2DConditionModel

from asdm_compress.inheritance.actions import Action, features_of, graph_for
from asdm_compress.inheritance.graph import PREDICTION
from asdm_compress.inheritance.places import find_places
from asdm_compress.inheritance.program import program_of
from asdm_compress.models.sites import find_sites

Kind = Literal["computed", "part", "held", "forecast"]
MEANINGS: Final[dict[Kind, str]] = {
    "computed": "computed",
    "part": "computed in part",
    "held": "inherited as it was",
    "forecast": "inherited by a forecast",
}
GUIDANCE: Final = "unconditional branch"


@dataclass(frozen=True, slots=True)
class ScheduleMap:
    """`cells[row][step]`; rows are parts of the UNet in the order in which they run, the guidance branch last."""

    rows: tuple[str, ...]
    steps: tuple[str, ...]
    cells: tuple[tuple[Kind, ...], ...]

    def share(self, row: int) -> float:
        """In how many of the steps a row is computed."""
        return sum(cell == "computed" for cell in self.cells[row]) / len(self.steps)


def map_on(unet: UNet2DConditionModel, actions: Sequence[Action]) -> ScheduleMap:
    """The map on a UNet, which may be without weights. Raises AsdmError where a place is not in it.

    What led only to inherited features is not computed either and counts as inherited in the same way.
    """
    places = find_places(unet)
    graph = graph_for(unet, places, actions)
    units = [site.path for site in find_sites(unet) if site.level == "unit" or site.kind in ("stem", "head")]
    every = [path for op in program_of(graph).ops for path in op.priced]
    of_unit = {unit: {p for p in every if p == unit or p.startswith(f"{unit}.")} for unit in units}
    units = [unit for unit in units if of_unit[unit]]
    known: dict[Action, tuple[Kind, ...]] = {}
    for action in dict.fromkeys(actions):
        program = program_of(graph, features_of(action, places))
        computed = {path for op in program.ops for path in op.priced}
        kinds: list[Kind] = []
        for unit in units:
            share = len(of_unit[unit] & computed) / len(of_unit[unit])
            kinds.append("computed" if share == 1 else "part" if share > 0 else _inherited(action))
        known[action] = (*kinds, _guidance(action))
    columns = [known[action] for action in actions]
    cells = tuple(tuple(column[i] for column in columns) for i in range(len(units) + 1))
    return ScheduleMap((*units, GUIDANCE), tuple(str(i) for i in range(len(actions))), cells)


def map_of_places(actions: Sequence[Action]) -> ScheduleMap:
    """The map without a UNet: the places that the schedule names."""
    places = list(dict.fromkeys(entry.place for action in actions for entry in action.inherits))
    rows = []
    for place in places:
        cells: list[Kind] = []
        for action in actions:
            entry = next((e for e in action.inherits if e.place == place), None)
            cells.append("computed" if entry is None else "forecast" if entry.forecast.order else "held")
        rows.append(tuple(cells))
    rows.append(tuple(_guidance(action) for action in actions))
    names = ["whole prediction" if place == PREDICTION else place for place in places]
    return ScheduleMap((*names, GUIDANCE), tuple(str(i) for i in range(len(actions))), tuple(rows))


def _inherited(action: Action) -> Kind:
    return "forecast" if any(entry.forecast.order for entry in action.inherits) else "held"


def _guidance(action: Action) -> Kind:
    if action.guidance is not None:
        return "forecast" if action.guidance.order else "held"
    skipped = [entry for entry in action.inherits if entry.place == PREDICTION]
    return "computed" if not skipped else _inherited(action)
