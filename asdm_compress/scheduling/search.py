"""Searches schedules: exact dynamic programming on the costs of single steps, then annealing on their joint damage.

The dynamic program goes over the steps with the anchors of both guidance branches as its state, and minimises cost plus
a price times the time. Going through the prices gives the lower hull of all schedules of its family in the plane of
time and cost: each of its corners is optimal for its own time, and the straight line between two corners is a bound
that no schedule of the family can be under.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from asdm_compress.scheduling.menu import EVERYTHING, WHOLE, Choice, Kind
from asdm_compress.scheduling.step_costs import Anchors, Costs, StepCosts, step_costs
from asdm_compress.scheduling.surrogate import COHERENT, NEVER, Surrogate
from asdm_compress.scheduling.timing import KindTimes

MOST_CORNERS: Final = 160
EXCHANGES: Final = 800  # that are tried for each step, of as many as these at most
MOST_STEPS: Final = 25
FEW_EXCHANGES: Final = 200  # where only better ones are kept, which ends sooner
# One exchange in e is kept that adds so much to the logarithm of the damage, at first and in the end.
HOT: Final = 0.1
COLD: Final = 0.01
SLACK: Final = 1e-9
_ONLY_TIME: Final = 1e30  # a price beside which every cost drowns
_MOST_TIME: Final = 1e9  # a price, over the cost of a schedule of least time, at which costs decide between equal times
_LEAST_COST: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Corner:
    """A schedule on the hull: its time as a share of computing everything, its summed cost."""

    share: float
    cost: float
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Front:
    """The corners of the hull, from the cheapest schedule to the one that computes everything.

    `tangents` are the prices of time that were solved for, each with the schedule that is best at that price.
    """

    corners: tuple[Corner, ...]
    tangents: tuple[tuple[float, Corner], ...]

    @property
    def cheapest(self) -> Corner:
        """The schedule of least time."""
        return self.corners[0]

    def best(self, share: float) -> Corner | None:
        """The corner of least cost whose time is at most `share`; None where there is none."""
        within = [corner for corner in self.corners if corner.share <= share * (1 + SLACK)]
        return min(within, key=lambda corner: corner.cost) if within else None

    def bound(self, share: float) -> float:
        """What the summed cost of no schedule of at most this time can be under."""
        return max(0.0, *(best.cost - price * (share - best.share) for price, best in self.tangents))


class DynamicProgram:
    """The schedules of least cost plus price times time, for any price."""

    def __init__(self, surrogate: Surrogate, times: KindTimes) -> None:
        self.times, self.steps = times, surrogate.steps
        self.kinds = tuple(kind for kind in surrogate.menu.kinds() if kind != EVERYTHING.kind)
        self.inheriting = tuple(kind for kind in self.kinds if kind[0] != WHOLE)
        self.costs = [step_costs(surrogate, step) for step in range(1, self.steps)]

    def at(self, times: KindTimes) -> DynamicProgram:
        """The same program under other times; what steps cost is not computed again."""
        twin = copy.copy(self)
        twin.times = times
        return twin

    def solve(self, price: float) -> Corner:
        """The optimum at a finite price, which is what one whole run's time costs. Zero asks for no error."""
        per_second = price / self.times.full_run
        anchors = Anchors(1)
        value = np.full((len(anchors.pairs),) * 2, np.inf)
        start = anchors.number[NEVER, 0]
        value[start, start] = 0.0
        came: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
        for costs in self.costs:
            value, source, kinds = self._next(value, costs, per_second)
            came.append((source, kinds))
        state = int(value.argmin())
        choices: list[Choice] = []
        for costs, (source, kinds) in zip(reversed(self.costs), reversed(came), strict=True):
            kind, before = self._numbered[int(kinds[state])], int(source[state])
            choices.append(_choice(costs, kind, before))
            state = before
        found = (EVERYTHING, *reversed(choices))
        cost = self.cost(found)
        return Corner(self.times.share(found), cost, found)

    def cost(self, choices: Sequence[Choice]) -> float:
        """The summed cost of a schedule of the family."""
        total, anchors = 0.0, Anchors(1)
        own = other = anchors.number[NEVER, 0]
        for costs, choice in zip(self.costs, choices[1:], strict=True):
            anchors = costs.anchors
            if choice != EVERYTHING:
                total += float(costs.cost[choice.kind][own, other])
            own = int(anchors.moved(choice.light == WHOLE)[own])
            other = int(anchors.moved(choice == EVERYTHING)[other])
        return total

    @property
    def _numbered(self) -> tuple[Kind, ...]:
        return (EVERYTHING.kind, *self.kinds)

    def _next(
        self, value: Costs, costs: StepCosts, per_second: float
    ) -> tuple[Costs, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The least values after a step, and by which state and kind each was come to."""
        computes, keeps = costs.anchors.moved(True), costs.anchors.moved(False)
        count = len(Anchors(costs.anchors.step + 1).pairs)
        seconds = self.times.seconds
        numbers = {kind: i for i, kind in enumerate(self._numbered)}
        moves = [(value + per_second * seconds[EVERYTHING.kind], np.zeros(value.shape, np.intp), computes, computes)]
        for kinds, own in ((tuple(k for k in self.kinds if k[0] == WHOLE), computes), (self.inheriting, keeps)):
            if kinds:
                stack = np.stack([costs.cost[kind] for kind in kinds])
                stack = stack + per_second * np.array([seconds[kind] for kind in kinds])[:, None, None]
                picked = stack.argmin(0)
                moves.append((value + stack.min(0), np.array([numbers[k] for k in kinds])[picked], own, keeps))
        values, sources, taken, targets = [], [], [], []
        for total, kinds_of, own, other in moves:
            values.append(total.ravel())
            taken.append(kinds_of.ravel())
            sources.append(np.arange(total.size))
            targets.append((own[:, None] * count + other[None, :]).ravel())
        flat, target = np.concatenate(values), np.concatenate(targets)
        order = np.lexsort((flat, target))
        first = order[np.unique(target[order], return_index=True)[1]]
        best = np.full(count * count, np.inf)
        source, kinds_at = np.zeros(count * count, np.intp), np.zeros(count * count, np.intp)
        where = target[first]
        best[where] = flat[first]
        source[where] = np.concatenate(sources)[first]
        kinds_at[where] = np.concatenate(taken)[first]
        return best.reshape(count, count), source, kinds_at


def find_front(program: DynamicProgram) -> Front:
    """The hull of all schedules of the family, corner by corner: between two of them lies another, or none does.

    Of a hull with more corners than `MOST_CORNERS` the rest is left out; the bound holds all the same.
    """
    # Of all schedules of least time the one of least cost, without which its cost would be no bound.
    scale = program.solve(_ONLY_TIME).cost
    most = _MOST_TIME * max(scale, _LEAST_COST)
    cheapest, dearest = program.solve(most), program.solve(0.0)
    found, open_pairs = [cheapest, dearest], [(cheapest, dearest)]
    tangents = [(most, cheapest), (0.0, dearest)]
    while open_pairs and len(found) < MOST_CORNERS:
        left, right = open_pairs.pop(0)
        if right.share - left.share < SLACK:
            continue
        price = (left.cost - right.cost) / (right.share - left.share)
        middle = program.solve(price)
        tangents.append((price, middle))
        line = left.cost - price * (middle.share - left.share)
        if middle.cost < line * (1 - 1e-9) and left.share < middle.share < right.share:
            found.append(middle)
            open_pairs += [(left, middle), (middle, right)]
    return Front(tuple(sorted(found, key=lambda corner: corner.share)), tuple(tangents))


def improved(
    surrogate: Surrogate,
    times: KindTimes,
    start: Sequence[Choice],
    share: float,
    coherent: float = COHERENT,
    exchanges: int = EXCHANGES,
    hot: float = HOT,
    seed: int = 0,
) -> tuple[Choice, ...]:
    """A schedule of at most `share` of the time with less joint damage, found by simulated annealing.

    There are `exchanges` for each step, up to `MOST_STEPS`: forecasts of a step, two steps swapped, or one or two that
    do something else, with which light actions mix. They end where the seed leads; with `hot` 0, which keeps only what
    is better, nearer to the start.
    """
    budget = share * (1 + SLACK)
    # Without what has no place in any schedule.
    within = [choice for choice in surrogate.menu.choices() if times.seconds[choice.kind] <= budget * times.full_run]
    chance, kinds, choices = random.Random(seed), _by_kind(within), list(start)
    damage = surrogate.damage(choices, coherent)
    best, least = choices, damage
    count = exchanges * min(surrogate.steps, MOST_STEPS) if surrogate.steps > 1 else 0
    for number in range(count):
        changed = _exchanged(choices, kinds, chance)
        if times.share(changed) > budget:
            continue
        value = surrogate.damage(changed, coherent)
        heat = hot * (COLD / HOT) ** (number / count)
        if value < damage or chance.random() < _chance(value, damage, heat):
            choices, damage = changed, value
            if damage < least:
                best, least = choices, damage
    return tuple(best)


def _by_kind(menu: Sequence[Choice]) -> dict[Kind, list[Choice]]:
    found: dict[Kind, list[Choice]] = {}
    for choice in menu:
        found.setdefault(choice.kind, []).append(choice)
    return found


def _exchanged(
    choices: Sequence[Choice], kinds: Mapping[Kind, Sequence[Choice]], chance: random.Random
) -> list[Choice]:
    def another() -> Choice:
        # Each kind as often as the others: those with two forecasts have four times as many choices.
        return chance.choice(kinds[chance.choice(list(kinds))])

    changed, steps = list(choices), range(1, len(choices))
    way = chance.randrange(4)
    i, j = chance.choice(steps), chance.choice(steps)
    if way == 0:
        changed[i], changed[j] = changed[j], changed[i]
    elif way == 1:
        changed[i] = chance.choice(kinds[changed[i].kind])
    else:
        changed[i] = another()
        if way == 3:
            changed[j] = another()
    return changed


def _chance(value: float, damage: float, heat: float) -> float:
    """How probably a schedule is kept whose damage is no less than that of the one before."""
    return float((damage / value) ** (1 / heat)) if heat and value > 0 else 0.0


def _choice(costs: StepCosts, kind: Kind, state: int) -> Choice:
    """The choice of a kind that is best for the anchors of a state."""
    if kind == EVERYTHING.kind:
        return EVERYTHING
    return costs.options[kind][int(costs.best[kind].ravel()[state])]
