"""Search by integer programming: the plan with the least damage under any number of budgets, with a bound."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from ortools.sat.python import cp_model

from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.polish import Problem, polish
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit, Resource, format_resource

# CP-SAT works on integers. Objectives are scaled so that their sum stays below this; costs below 2^62 by their units.
OBJECTIVE_RESOLUTION = 10**13
TIME_LIMIT_SECONDS = 10.0
_ROUNDING = 1e-6  # of a unit: what floating-point division may be off by
_COST_UNITS: Mapping[Resource, float] = {"latency": 1e-9, "macs": 1.0, "params": 1.0}


Pairs = Mapping[frozenset[str], float]
Interaction = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan with its summed damage, the proven lower bound of any plan's, and its predicted costs.

    The damage holds the terms of all pairs of its options, the bound those of the `pairs` pairs that were looked at:
    it is one for all plans only as far as no other pair's term is negative.
    """

    plan: Plan
    options: tuple[Option, ...]
    damage: float
    bound: float
    proven: bool
    costs: Mapping[Resource, float]
    seconds: float
    pairs: int = 0

    @property
    def gap(self) -> float:
        """The share of the damage that the best possible plan may at most save; 0 when optimality is proven."""
        return 0.0 if self.proven or self.damage == 0 else (self.damage - self.bound) / self.damage


def solve(
    options: Sequence[Option],
    damages: Mapping[str, float],
    teacher: Mapping[Resource, float],
    limits: Sequence[Limit],
    pairs: Pairs | None = None,
    interaction: Interaction | None = None,
    patience: float = TIME_LIMIT_SECONDS,
) -> Solution:
    """The options that do not overlap, meet every limit, and have the least damage: summed, with the terms of pairs.

    `damages` maps option names to damages (0 or more); `pairs` two options' names to what their damage together is
    above the sum of their own (or, negative, below). `interaction` says the same of any two options; its terms are
    taken in for the pairs that a solution has, and the search is made again until they are all in, or `patience`
    seconds are over. Raises AsdmError with exit code 3, naming the smallest budget that can be reached, when no choice
    of options meets the limits.
    """
    known = dict(pairs or {})
    problem = _problem(options, damages, teacher, limits, known, interaction)
    began = time.perf_counter()
    at = {o.name: i for i, o in enumerate(options)}
    best: tuple[int, ...] | None = None
    bound = 0.0  # the solver's last; of fewer pairs than are known where the next took too long
    while True:
        newest = _solve_known(options, damages, teacher, limits, known, patience)
        if newest is None:  # with the newest pairs it takes longer than there is patience for
            if best is None:
                raise AsdmError(
                    f"no plan was found in {patience:.3g} s", "Give the search more time.", ExitCode.INFEASIBLE
                )
            found, proven = tuple(options[i] for i in best), False
        else:
            found, bound, proven = newest
        solved = tuple(at[o.name] for o in found)
        polished = polish(problem, solved) if interaction else solved
        if best is None or problem.damage(polished) < problem.damage(best):
            best = polished
        new: dict[frozenset[str], float] = {}
        if interaction:
            for choice in (solved, polished):
                named = sorted(options[i].name for i in choice)
                new |= {frozenset(pair): interaction(*pair) for pair in combinations(named, 2)}
        new = {pair: term for pair, term in new.items() if pair not in known}
        known |= new
        seconds = time.perf_counter() - began
        if new and newest is not None and seconds < patience:
            continue
        picked = tuple(options[i] for i in _with_what_is_free(best, options, problem, limits))
        damage = _summed_damage(picked, damages, known)
        return Solution(
            plan=Plan({o.site: o.edit for o in picked}),
            options=picked,
            damage=damage,
            # The solver has not seen the newest pairs, whose terms can lower the sum; no plan does less than nothing.
            bound=min(damage, max(bound + sum(min(0.0, term) for term in new.values()), 0.0)),
            proven=proven and not new,
            costs=costs_of(picked, teacher),
            seconds=seconds,
            pairs=len(known),
        )


def _with_what_is_free(
    picked: tuple[int, ...], options: Sequence[Option], problem: Problem, limits: Sequence[Limit]
) -> tuple[int, ...]:
    """The options by number, and all others that damage nothing beside them and save something of what is limited.

    To the solver they are as good in as out wherever the limits are met without them.
    """
    found = list(picked)
    for number, option in enumerate(options):
        saved = [option.savings[limit.resource] for limit in limits]
        saves = bool(saved) and min(saved) >= 0 and max(saved) > 0
        if saves and problem.damages[number] == 0 and number not in found:
            free = not problem.overlaps[number, found].any() and not problem.pairs[number, found].any()
            found += [number] if free else []
    return tuple(found)


def _problem(
    options: Sequence[Option],
    damages: Mapping[str, float],
    teacher: Mapping[Resource, float],
    limits: Sequence[Limit],
    known: Pairs,
    interaction: Interaction | None,
) -> Problem:
    """The same search for the polishing, with the terms of all pairs."""
    count = len(options)
    terms = np.zeros((count, count))
    overlaps = np.zeros((count, count), dtype=bool)
    for (i, one), (j, other) in combinations(enumerate(options), 2):
        between = interaction(one.name, other.name) if interaction else 0.0
        terms[i, j] = terms[j, i] = known.get(frozenset((one.name, other.name)), between)
        overlaps[i, j] = overlaps[j, i] = not one.atoms.isdisjoint(other.atoms)
    # In the solver's own integers, so that what is allowed here is allowed there.
    savings = [[_integer(o.savings[limit.resource], limit.resource) for o in options] for limit in limits]
    missing = [_missing(limit, teacher) for limit in limits]
    return Problem(
        np.array([damages[o.name] for o in options]),
        terms,
        overlaps,
        np.array(savings, dtype=float).reshape(len(limits), count),
        np.array(missing, dtype=float),
    )


def _solve_known(
    options: Sequence[Option],
    damages: Mapping[str, float],
    teacher: Mapping[Resource, float],
    limits: Sequence[Limit],
    known: Pairs,
    patience: float,
) -> tuple[tuple[Option, ...], float, bool] | None:
    """The best options under these pair terms alone, the bound, and whether it is proven; None if none was found."""
    total = sum(damages[o.name] for o in options) + sum(abs(term) for term in known.values())
    if not math.isfinite(total):
        broken = [o.name for o in options if not math.isfinite(damages[o.name])]
        broken += [" with ".join(sorted(pair)) for pair, term in known.items() if not math.isfinite(term)]
        raise AsdmError(
            f"the damage of {len(broken)} edits is not a finite number, the first is {broken[0]}",
            "Does the model overflow in this dtype? Try --dtype fp32.",
        )
    scale = OBJECTIVE_RESOLUTION / (total or 1.0)
    model, chosen = _choice_model(options)
    for limit in limits:
        _require(model, chosen, options, limit, teacher)
    together = _pair_variables(model, chosen, known)
    model.minimize(
        sum(round(damages[o.name] * scale) * chosen[o.name] for o in options)
        + sum(round(known[pair] * scale) * variable for pair, variable in together.items())
    )
    solver = _solver(patience)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        raise _infeasible(options, teacher, limits)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    picked = tuple(o for o in options if solver.boolean_value(chosen[o.name]))
    return picked, solver.best_objective_bound / scale, status == cp_model.OPTIMAL


def _summed_damage(options: Sequence[Option], damages: Mapping[str, float], pairs: Pairs) -> float:
    """The damages of options and the terms of those pairs that are among them."""
    names = {o.name for o in options}
    return sum(damages[name] for name in names) + sum(term for pair, term in pairs.items() if pair <= names)


def _pair_variables(
    model: cp_model.CpModel, chosen: Mapping[str, cp_model.IntVar], pairs: Pairs
) -> dict[frozenset[str], cp_model.IntVar]:
    """For each pair a variable that says whether both are chosen."""
    together = {}
    for pair in sorted(pairs, key=sorted):
        both = [chosen[name] for name in sorted(pair)]
        variable = model.new_bool_var(" and ".join(sorted(pair)))
        model.add_bool_and(both).only_enforce_if(variable)
        model.add_bool_or([b.negated() for b in both]).only_enforce_if(variable.negated())
        together[pair] = variable
    return together


def check_reachable(options: Sequence[Option], teacher: Mapping[Resource, float], limits: Sequence[Limit]) -> None:
    """Raise AsdmError with exit code 3, naming the smallest budget that can be reached, where no plan meets the limits.

    What edits damage says nothing about that, so that it is known before any is measured.
    """
    first, *others = limits
    best, proven = _least(options, teacher, first.resource, others)
    if proven and (best is None or best > first.absolute(teacher[first.resource]) * (1 + _ROUNDING)):
        raise _infeasible(options, teacher, limits)


def costs_of(options: Sequence[Option], teacher: Mapping[Resource, float]) -> dict[Resource, float]:
    """The teacher's costs less the savings of the options."""
    return {resource: cost - sum(o.savings[resource] for o in options) for resource, cost in teacher.items()}


def smallest_reachable(
    options: Sequence[Option], teacher: Mapping[Resource, float], resource: Resource, others: Sequence[Limit] = ()
) -> float | None:
    """The least cost of one resource over all plans that meet the other limits, or None where none does.

    Of what is found in the solver's time, where that does not suffice for all.
    """
    return _least(options, teacher, resource, others)[0]


def _least(
    options: Sequence[Option], teacher: Mapping[Resource, float], resource: Resource, others: Sequence[Limit]
) -> tuple[float | None, bool]:
    """The same, and whether it is proven."""
    model, chosen = _choice_model(options)
    for limit in others:
        _require(model, chosen, options, limit, teacher)
    model.maximize(sum(_integer(o.savings[resource], resource) * chosen[o.name] for o in options))
    solver = _solver()
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, status == cp_model.INFEASIBLE
    # As the search counts them, in whole units rounded down: what is named can be reached.
    saved = sum(_integer(o.savings[resource], resource) for o in options if solver.boolean_value(chosen[o.name]))
    return teacher[resource] - saved * _COST_UNITS[resource], status == cp_model.OPTIMAL


def _choice_model(options: Sequence[Option]) -> tuple[cp_model.CpModel, dict[str, cp_model.IntVar]]:
    model = cp_model.CpModel()
    chosen = {o.name: model.new_bool_var(o.name) for o in options}
    touching: dict[str, list[cp_model.IntVar]] = {}
    for option in options:
        for atom in option.atoms:
            touching.setdefault(atom, []).append(chosen[option.name])
    for variables in touching.values():
        model.add_at_most_one(variables)
    return model, chosen


def _require(
    model: cp_model.CpModel,
    chosen: Mapping[str, cp_model.IntVar],
    options: Sequence[Option],
    limit: Limit,
    teacher: Mapping[Resource, float],
) -> None:
    saved = sum(_integer(o.savings[limit.resource], limit.resource) * chosen[o.name] for o in options)
    model.add(saved >= _missing(limit, teacher))


def _missing(limit: Limit, teacher: Mapping[Resource, float]) -> int:
    """What must be saved, rounded up; savings are rounded down, so that a plan that passes meets the limit."""
    over = teacher[limit.resource] - limit.absolute(teacher[limit.resource])
    return math.ceil(over / _COST_UNITS[limit.resource] - _ROUNDING)


def _integer(saving: float, resource: Resource) -> int:
    return math.floor(saving / _COST_UNITS[resource] + _ROUNDING)


def _solver(patience: float = TIME_LIMIT_SECONDS) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = patience
    solver.parameters.random_seed = 0
    solver.parameters.relative_gap_limit = 0.0
    # Ctrl-C ends the program, not only the search, which would go on with an unproven plan.
    solver.parameters.catch_sigint_signal = False
    return solver


def _infeasible(options: Sequence[Option], teacher: Mapping[Resource, float], limits: Sequence[Limit]) -> AsdmError:
    reachable = []
    for limit in limits:
        others = [other for other in limits if other is not limit]
        best = smallest_reachable(options, teacher, limit.resource, others)
        if best is None:
            reachable.append(f"{limit.resource}: none, the other limits cannot be met")
        elif best > limit.absolute(teacher[limit.resource]):
            share = math.ceil(1e4 * best / teacher[limit.resource]) / 1e4  # rounded up: what is named can be reached
            reachable.append(f"{limit.resource}={share:.4f}x ({format_resource(limit.resource, best)})")
    wanted = ", ".join(str(limit) for limit in limits)
    return AsdmError(
        f"no plan meets the budget {wanted}; the smallest that can be reached is {'; '.join(reachable)}",
        "Choose a larger budget.",
        ExitCode.INFEASIBLE,
    )
