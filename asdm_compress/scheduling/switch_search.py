"""The step → member list of least final-latent error within a time, exactly for the model of the error in `swaps`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action
from asdm_compress.scheduling.swaps import Swaps, is_possible, needs_of
from asdm_compress.scheduling.switch_times import StepTimes

PATIENCE: Final = 20.0  # seconds
_SCALE: Final = 10**7  # the largest term of the objective as an integer
_TICKS: Final = 10**9  # the budget as an integer
_SOLVED: Final = (cp_model.OPTIMAL, cp_model.FEASIBLE)


@dataclass(frozen=True, slots=True)
class Found:
    """The schedule, its error as the model has it, and what no schedule within the time can be under.

    Where at most `most_changes` were allowed, bound and proof are of schedules that keep to them.
    """

    actions: tuple[Action, ...]
    predicted: float
    bound: float
    proven: bool
    most_changes: int | None = None


@dataclass(frozen=True, slots=True)
class _Terms:
    """Σ_i a_i x_i + Σ_(i<j) b_ij x_i x_j + c over the exchanges, with their pairs in order."""

    pairs: tuple[tuple[int, Action], ...]
    linear: npt.NDArray[np.float64]
    products: npt.NDArray[np.float64]
    constant: float

    @staticmethod
    def of(swaps: Swaps) -> _Terms:
        pairs = tuple(swaps.moved)
        error = swaps.error.astype(np.float64).ravel()
        rows = np.array([swaps.moved[pair].ravel() for pair in pairs], np.float64).reshape(-1, error.size)
        rows = rows / np.sqrt(error.size)
        error = error / np.sqrt(error.size)
        gram = rows @ rows.T
        return _Terms(pairs, np.diag(gram) + 2 * rows @ error, 2 * np.triu(gram, 1), float(error @ error))

    def value(self, chosen: Sequence[int]) -> float:
        """The objective when these exchanges are made."""
        at = np.array(sorted(chosen), dtype=int)
        return self.constant + float(self.linear[at].sum() + self.products[np.ix_(at, at)].sum())


def solve(
    swaps: Swaps,
    times: StepTimes,
    budget: float,
    most_changes: int | None = None,
    patience: float = PATIENCE,
) -> Found | None:
    """The best schedule whose run takes at most `budget` seconds; None where there is none.

    `most_changes` keeps it near the schedule that was measured around, as far as that is within the time. Raises
    AsdmError where `patience` seconds do not tell whether there is one.
    """
    terms = _Terms.of(swaps)
    model = cp_model.CpModel()
    taken = [model.new_bool_var(f"{t} {option.name}") for t, option in terms.pairs]
    steps = range(len(swaps.schedule))
    by_step = {t: [i for i, (step, _) in enumerate(terms.pairs) if step == t] for t in steps}
    stays = {t: model.new_bool_var(f"{t} stays") for t in steps}
    for t in steps:
        model.add_exactly_one([stays[t], *(taken[i] for i in by_step[t])])
    left = budget - times.outside
    tick = left / _TICKS
    if tick <= 0:
        return None
    cost = [math.ceil(times.seconds[option] / tick) for _, option in terms.pairs]
    kept = {t: math.ceil(times.seconds[swaps.schedule[t]] / tick) for t in steps}
    model.add(sum(c * x for c, x in zip(cost, taken, strict=True)) + sum(kept[t] * stays[t] for t in steps) <= _TICKS)
    choices = [[(swaps.schedule[t], stays[t]), *((terms.pairs[i][1], taken[i]) for i in by_step[t])] for t in steps]
    for t, here in enumerate(choices):
        for option, variable in here:
            for need in needs_of(option):
                before = [x for some in choices[max(0, t - need.within) : t] for other, x in some if need.met_by(other)]
                model.add_bool_or([variable.negated(), *before])
    if most_changes is not None and taken:
        model.add(sum(taken) <= most_changes)
    largest = max(np.abs(terms.linear).max(initial=0.0), np.abs(terms.products).max(initial=0.0), 1e-300)
    objective = [round(value / largest * _SCALE) * x for value, x in zip(terms.linear, taken, strict=True)]
    # Without products it is a small program, whose solution the whole one starts from.
    model.minimize(sum(objective))
    solver = _solver(patience)
    status = solver.solve(model)
    if status == cp_model.UNKNOWN:
        raise AsdmError(
            f"{patience:g} s were not enough to tell whether a schedule takes {budget:.3g} s",
            "Ask for another time, or try again when less else runs on this machine.",
        )
    if status not in _SOLVED:
        return None
    chosen = [i for i, x in enumerate(taken) if solver.value(x)]
    chosen = _descended(terms, swaps, times, budget, chosen, most_changes)
    for i, x in enumerate(taken):
        model.add_hint(x, i in chosen)
    objective += _products(model, terms, taken, largest)
    model.minimize(sum(objective))
    solver = _solver(patience)
    status = solver.solve(model)
    if status in _SOLVED:
        solved = [i for i, x in enumerate(taken) if solver.value(x)]
        chosen = min(chosen, solved, key=terms.value)
    bound = terms.constant + solver.best_objective_bound / _SCALE * largest if status in _SOLVED else 0.0
    improved = _descended(terms, swaps, times, budget, chosen, most_changes)
    value = terms.value(improved)
    proven = status == cp_model.OPTIMAL
    return Found(_applied(terms, swaps, improved), value, min(bound, value), proven, most_changes)


def _products(
    model: cp_model.CpModel, terms: _Terms, taken: Sequence[cp_model.IntVar], largest: float
) -> list[cp_model.LinearExpr]:
    """The terms of two exchanges: products of 0-1 variables, each needed from one side only, by its factor's sign."""
    found: list[cp_model.LinearExpr] = []
    for i, j in zip(*np.nonzero(terms.products), strict=True):
        factor = round(terms.products[i, j] / largest * _SCALE)
        if terms.pairs[i][0] == terms.pairs[j][0] or not factor:
            continue
        both = model.new_bool_var("")
        if factor > 0:
            model.add_bool_or([taken[i].negated(), taken[j].negated(), both])
        else:
            model.add_implication(both, taken[i])
            model.add_implication(both, taken[j])
        found.append(factor * both)
    return found


def _solver(patience: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = patience
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    return solver


def small_first(small: Action, large: Action, steps: int, times: StepTimes, budget: float) -> tuple[Action, ...] | None:
    """T-Stitch's order (2402.14167) within a time: as few steps of the small member as it allows, all at the start."""
    for count in range(steps + 1):
        actions = (small,) * count + (large,) * (steps - count)
        if times.run(actions) <= budget * (1 + 1e-9):
            return actions
    return None


def _applied(terms: _Terms, swaps: Swaps, chosen: Sequence[int]) -> tuple[Action, ...]:
    actions = list(swaps.schedule)
    for i in chosen:
        step, option = terms.pairs[i]
        actions[step] = option
    return tuple(actions)


def _descended(
    terms: _Terms, swaps: Swaps, times: StepTimes, budget: float, chosen: Sequence[int], most_changes: int | None
) -> list[int]:
    """A solution made better by exchanges of one or two steps, where the solver ran out of time."""
    best, value = list(chosen), terms.value(chosen)
    at = {pair: i for i, pair in enumerate(terms.pairs)}
    options = [[None, *(i for pair, i in at.items() if pair[0] == t)] for t in range(len(swaps.schedule))]
    moving = True
    while moving:
        moving = False
        for a, b in itertools.combinations(range(len(options)), 2):
            for one, other in itertools.product(options[a], options[b]):
                tried = [i for i in best if terms.pairs[i][0] not in (a, b)]
                tried += [i for i in (one, other) if i is not None]
                if most_changes is not None and len(tried) > most_changes:
                    continue
                found = terms.value(tried)
                if found >= value * (1 - 1e-9) - 1e-15:
                    continue
                actions = _applied(terms, swaps, tried)
                if times.run(actions) <= budget and is_possible(actions):
                    best, value, moving = tried, found, True
    return best
