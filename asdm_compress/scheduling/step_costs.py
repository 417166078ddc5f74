"""What single steps cost, for all pairs of anchors that they may take: the terms that the dynamic program adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from asdm_compress.inheritance.forecast import Forecast
from asdm_compress.scheduling.menu import WHOLE, Choice, Kind
from asdm_compress.scheduling.responses import REACH
from asdm_compress.scheduling.surrogate import NEVER, Pair, Surrogate

LOST: Final[Pair] = (NEVER, NEVER)  # anchors so old that nothing is known of what they would do
Costs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Anchors:
    """All pairs of anchors that a step can have, numbered, and what they become at the next one."""

    step: int

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs; the last one stands for anchors that are out of reach."""
        near = range(max(0, self.step - REACH), self.step)
        return (*((older, newer) for newer in near for older in (NEVER, *range(near[0], newer))), LOST)

    @cached_property
    def number(self) -> dict[Pair, int]:
        """The number of each pair."""
        return {pair: i for i, pair in enumerate(self.pairs)}

    def moved(self, computes: bool) -> npt.NDArray[np.intp]:
        """For each pair the number of what it is at the next step, after this one has computed or not."""
        later = Anchors(self.step + 1)
        found = []
        for older, newer in self.pairs:
            pair = (newer, self.step) if computes else (older, newer)
            found.append(later.number[_within(pair, later.step)])
        return np.array(found)


def _within(pair: Pair, step: int) -> Pair:
    """A pair without what is out of reach at a step."""
    older, newer = pair
    if newer == NEVER or step - newer > REACH:
        return LOST
    return (older if older != NEVER and step - older <= REACH else NEVER, newer)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The least cost of every kind but everything at one step, and which forecasts it takes for it.

    `cost[kind]` is (pairs of the branch with the prompt, pairs of the other and of the difference), infinite where
    anchors are lost; `best[kind]` the number of the forecasts in `options[kind]`.
    """

    anchors: Anchors
    cost: Mapping[Kind, Costs]
    best: Mapping[Kind, npt.NDArray[np.intp]]
    options: Mapping[Kind, tuple[Choice, ...]]


def step_costs(surrogate: Surrogate, step: int) -> StepCosts:
    """The costs of one step: mean squared errors of the final latent, each as if it were the run's only error.

    Features and the difference are taken to come from steps that computed everything of their branch; that others
    refresh some features too is left to the joint damage.
    """
    anchors = Anchors(step)
    menu, scale = surrogate.menu, float(surrogate.gains[step]) ** 2
    cost: dict[Kind, Costs] = {}
    best: dict[Kind, npt.NDArray[np.intp]] = {}
    options: dict[Kind, tuple[Choice, ...]] = {}
    lost = {f: _differences(surrogate, anchors, f) for f in menu.forecasts} if menu.guided else {}
    features = {
        (light, row, f): _features(surrogate, anchors, light, row, f)
        for light in range(len(menu.lights))
        for row in range(surrogate.branches)
        for f in menu.forecasts
    }
    for kind in menu.kinds():
        light, conditional = kind
        if kind == (WHOLE, False):
            continue
        tables: list[Costs] = []
        choices = tuple(choice for choice in menu.choices() if choice.kind == kind)
        for choice in choices:
            if conditional:
                first = None if light == WHOLE else features[light, 1, choice.forecast]
                second = (surrogate.guidance - 1) * lost[choice.difference]
            elif menu.guided:
                first = surrogate.guidance * features[light, 1, choice.forecast]
                second = (1 - surrogate.guidance) * features[light, 0, choice.forecast]
            else:
                first, second = features[light, 0, choice.forecast], None
            tables.append(scale * _squares(first, second, len(anchors.pairs)))
        stack = np.stack(tables)
        best[kind] = stack.argmin(0)
        cost[kind] = stack.min(0)
        options[kind] = choices
    return StepCosts(anchors, cost, best, options)


def _squares(first: Costs | None, second: Costs | None, count: int) -> Costs:
    """Mean squares of first + second for all pairs of each, (pairs, pairs); NaN stands for what is not known."""
    total = np.zeros((count, count))
    for part, shape in ((first, (count, 1)), (second, (1, count))):
        if part is not None:
            total = total + np.square(part).sum(-1).mean(-1).reshape(shape)
    if first is not None and second is not None:
        runs = first.shape[1]
        total = total + 2 * (first.reshape(count, -1) @ second.reshape(count, -1).T) / runs
    return np.where(np.isnan(total), np.inf, np.maximum(total, 0.0))


def _features(surrogate: Surrogate, anchors: Anchors, light: int, row: int, forecast: Forecast) -> Costs:
    """The errors of a branch's prediction for all pairs, (pairs, N, D)."""
    found = []
    for pair in anchors.pairs:
        steps, factors = _taken(surrogate, anchors.step, pair, forecast)
        found.append(surrogate.feature_error(anchors.step, light, row, steps, factors) if steps else None)
    return _stacked(found, surrogate)


def _differences(surrogate: Surrogate, anchors: Anchors, forecast: Forecast) -> Costs:
    """The errors of the guidance difference for all pairs, (pairs, N, D)."""
    found = []
    for pair in anchors.pairs:
        steps, factors = _taken(surrogate, anchors.step, pair, forecast)
        found.append(surrogate.difference_error(anchors.step, steps, factors) if steps else None)
    return _stacked(found, surrogate)


def _taken(surrogate: Surrogate, step: int, pair: Pair, forecast: Forecast) -> tuple[list[int], tuple[float, ...]]:
    """Steps and factors of a forecast; none where an anchor that it takes is lost.

    A pair without an older anchor can only hold, unless there never was one.
    """
    if pair == LOST or (forecast.order and pair[0] == NEVER and pair[1] != 0):
        return [], ()
    return surrogate.taken(step, pair, forecast)


def _stacked(found: Sequence[Costs | None], surrogate: Surrogate) -> Costs:
    unknown = np.full(surrogate.responses.predictions.shape[2:], np.nan)
    return np.stack([unknown if errors is None else errors for errors in found])
