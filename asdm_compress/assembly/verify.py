"""Several searches for one budget, and of their plans, built, timed, fitted and measured, the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.attempts import ATTEMPTS, LEAST_ATTEMPTS, PLAIN_ATTEMPTS, Attempt, Search
from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import measure_plan, predictions
from asdm_compress.assembly.in_time import Clock, InTime, search_in_time
from asdm_compress.assembly.option_fit import absorber
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import SHARE_FOR_STATES, RefitChoice, fit_plan, for_memory
from asdm_compress.assembly.search import TIME_LIMIT_SECONDS, Pairs, Solution
from asdm_compress.assembly.surgery import assemble
from asdm_compress.assembly.teacher_runs import TeacherRuns
from asdm_compress.core.edits import EXACT, Edit, has_weights
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit, Resource
from asdm_compress.models.edits import SlotWeights

DAMAGE_TOLERANCE: Final = 0.15  # of the predicted damage
PAIRS_PER_ROUND: Final = 4
LIKENESS_POWER: Final = 4  # how much more a plan counts that shares more edits with the one that is predicted
NEIGHBOUR_PATIENCE: Final = 2.0  # seconds of a search for one of them
PLAYED_OFF: Final = 3  # plans at most
ALIKE: Final = 1.5  # times the least measured damage: by so much the prompts of one half may mistake a plan


@dataclass(frozen=True, slots=True)
class Verified:
    """A solution, the student built from it, and what the student costs as measured (latency) and counted (the rest).

    `solved_for` are the limits that the solution's proof holds for: others than the user's where a first plan
    measured slower or faster than predicted, and for the plans and damages of the `attempt` that led to it. Its damage
    holds the terms of pairs, of which `pairs` were looked at.
    `predicted_damage` is the sum of damages and pair terms times the factor by which those of the plans most like it
    were measured to be off, and `measured_damage` that of the whole plan on prompts that were kept out of its fits;
    `predicted_latency_ratio` is to `latency_ratio` what the two are to each other. The student and `slot_weights` are
    fitted to all prompts.
    """

    solution: Solution
    student: UNet2DConditionModel
    costs: Mapping[Resource, float]
    latency_ratio: float
    predicted_latency_ratio: float
    solved_for: tuple[Limit, ...]
    rounds: int
    slot_weights: SlotWeights
    predicted_damage: float
    measured_damage: float
    pairs: int
    attempt: Attempt = ATTEMPTS[0]


@dataclass(frozen=True, slots=True)
class _Moments:
    """What is fitted on, what is measured on, and what the teacher predicts for the latter.

    `runs` are the teacher's states on the former, for all plans, where there is memory for them.
    """

    fitting: Calibration
    measuring: Calibration
    reference: Tensor
    runs: TeacherRuns | None = None

    @classmethod
    def of(cls, teacher: UNet2DConditionModel, parts: tuple[Calibration, Calibration]) -> _Moments:
        """Those of the two parts of a calibration."""
        runs = TeacherRuns.kept_within(teacher, parts[0], SHARE_FOR_STATES)
        return cls(*parts, predictions(teacher, parts[1]), runs)


@dataclass(frozen=True, slots=True)
class _Found:
    """What one attempt led to: a plan in time, and its damage fitted without the prompts that it is measured on."""

    attempt: Attempt
    in_time: InTime
    measured: float
    seconds: float  # that the fit and the measuring took
    both_ways: float | None = None  # the mean of that and of the damage fitted and measured the other way round
    without: str | None = None  # the edit that its search was not to use


def search_verified(search: Search) -> Verified:
    """The best plan whose built student, with its convolutions and narrowed modules fitted, keeps every limit.

    The search takes one-shot errors to add up (`Damage.interaction`). Where the plan's measured damage is not what that
    says, the pairs of edits that weigh most are fitted and measured together, and the search is made again with what
    they add and less belief in the rest; sums are taken times what the plans most like theirs were off by. Some
    searches only take out (see `ATTEMPTS`), and some of these know nothing of refits (see `PLAIN_ATTEMPTS`). Then the
    best plan's neighbours are tried (see `_neighbours`). Of all plans found on the way, the one of least measured
    damage is returned, fitted anew to all prompts. Raises AsdmError with exit code 3 when no plan meets the limits, or
    none is measured to within the rounds of `search_in_time`.
    """
    halves = search.calibration.for_plans()
    moments = _Moments.of(search.teacher, halves)
    clock = search.clock()
    pairs: dict[frozenset[str], float] = {}
    found, refused = _attempts(search, clock, pairs, moments)
    if not found:
        assert refused is not None
        raise refused
    _neighbours(search, clock, found, pairs, moments)
    played = _play_off(search, found, halves)
    best = played[0]
    solution = _among_all_edits(search, best, pairs)
    others = [f for f in found if f.in_time is not best.in_time]
    off = _likely_factor([(f, _off(search, f, pairs)) for f in others], solution.plan)
    # What the other half's prompts differ by is told by the other plans that were measured on it too.
    off *= _likely_factor([(f, f.both_ways / f.measured) for f in played[1:] if f.both_ways], solution.plan)
    slower = _likely_factor([(f, f.in_time.slower) for f in others], solution.plan)
    weights = search.fit(solution.plan, search.calibration)
    return Verified(
        solution=solution,
        student=assemble(clock.teacher, solution.plan, weights),
        costs=best.in_time.costs,
        latency_ratio=best.in_time.latency_ratio,
        predicted_latency_ratio=slower * max(solution.costs["latency"] / search.profile.latency, 1e-9),
        solved_for=best.in_time.solved_for,
        rounds=best.in_time.rounds,
        slot_weights=weights,
        predicted_damage=search.predicted(solution.options, pairs) * off,
        measured_damage=best.both_ways or best.measured,
        pairs=solution.pairs,
        attempt=best.attempt,
    )


def _attempts(
    search: Search,
    clock: Clock,
    pairs: dict[frozenset[str], float],
    moments: _Moments,
) -> tuple[list[_Found], AsdmError | None]:
    """The plans of the attempts, and why the first that led to none did not. What pairs add is put into `pairs`."""
    found: list[_Found] = []
    refused: AsdmError | None = None
    limits = {with_weights: tuple(search.limits) for with_weights in (False, True)}
    settled, as_single = False, None
    for number, attempt in enumerate((*ATTEMPTS, *PLAIN_ATTEMPTS), start=1):
        here = search.suited_to(attempt)
        if here is None or (settled and not attempt.plain):
            continue
        try:
            in_time = search_in_time(_solver(here, attempt, pairs), clock, limits[attempt.with_weights])
        except AsdmError as error:
            if error.exit_code != ExitCode.INFEASIBLE:
                raise
            refused = refused or error
            continue
        limits[attempt.with_weights], solution = clock.asked_for(in_time.slower), in_time.solution
        if any(solution.plan.unshared == f.in_time.solution.plan.unshared for f in found):
            continue
        measured, seconds = _fitted_damage(search, solution.plan, moments)
        # Which also takes in what these prompts differ by from those that single edits were measured on.
        off = _likely_factor([(f, _off(search, f, pairs)) for f in found], solution.plan)
        predicted = search.predicted(solution.options, pairs) * off
        found.append(_Found(attempt, in_time, measured, seconds))
        settled |= number >= LEAST_ATTEMPTS and abs(measured - predicted) <= DAMAGE_TOLERANCE * predicted
        if attempt.with_weights and not settled and number < len(ATTEMPTS):
            # On the moments that single edits were measured on: what a pair adds is a difference of the two.
            as_single = as_single or _Moments.of(search.teacher, _of_options(search))
            pairs |= _measure_pairs(search, solution.options, pairs, as_single)
    return found, refused


def _of_options(search: Search) -> tuple[Calibration, Calibration]:
    """What pairs of edits are fitted on, as far as there is memory for it, and what they are measured on."""
    fitting, measuring = search.of_options or search.calibration.for_options()
    return for_memory(search.teacher, fitting), measuring


def _neighbours(
    search: Search,
    clock: Clock,
    found: list[_Found],
    pairs: Pairs,
    moments: _Moments,
) -> None:
    """Try plans without one edit of the best plan so far, and add them to `found`, for `neighbours_seconds` at most.

    What single edits damage, and pairs of them, only says which plans are worth a fit; which of these is the best is
    measured. The edits that damage most by their prediction go first. Where a fit takes longer than that, as at full
    size, nothing is tried.
    """
    began, longest = time.monotonic(), max(f.seconds for f in found)
    tried: set[tuple[frozenset[tuple[str, Edit]], str]] = set()
    while time.monotonic() - began + longest < search.neighbours_seconds:
        best = min(found, key=lambda f: f.measured)
        options, here = best.in_time.solution.options, search.suited_to(best.attempt) or search
        plan = frozenset(best.in_time.solution.plan.edits.items())
        untried = [o for o in options if (plan, o.name) not in tried and o.edit not in EXACT]
        if not untried:
            return
        weighs = {o.name: search.predicted(options, pairs) - search.predicted([p for p in options if p is not o], pairs)
                  for o in untried}  # fmt: skip
        without = max(untried, key=lambda o: weighs[o.name]).name
        tried.add((plan, without))
        since = time.monotonic()
        solver = _solver(here.without(without), best.attempt, pairs, NEIGHBOUR_PATIENCE)
        try:
            in_time = search_in_time(solver, clock, clock.asked_for(best.in_time.slower))
        except AsdmError as error:
            if error.exit_code != ExitCode.INFEASIBLE:
                raise
            continue
        solution = in_time.solution
        if any(solution.plan.unshared == f.in_time.solution.plan.unshared for f in found):
            continue
        found.append(_Found(best.attempt, in_time, *_fitted_damage(search, solution.plan, moments), without=without))
        longest = max(longest, time.monotonic() - since)


def _play_off(search: Search, found: Sequence[_Found], halves: tuple[Calibration, Calibration]) -> list[_Found]:
    """The plans of least measured damage, the best first; where several are alike, by the mean of both ways round.

    A few prompts make up most of a damage, so that either half of them alone may take a worse plan for the best. Plans
    alike are fitted to the half that they were measured on, and measured on the one that they were fitted to, where
    there are halves and that takes no longer than neighbours may.
    """
    best, *others = sorted(found, key=lambda f: f.measured)[:PLAYED_OFF]
    alike = [best, *(f for f in others if f.measured <= ALIKE * best.measured)]
    even = halves[0] is not halves[1] and abs(len(halves[0]) - len(halves[1])) <= len(halves[0]) / 4
    if len(alike) == 1 or not even or sum(f.seconds for f in alike) > search.neighbours_seconds:
        return [best]
    turned = _Moments.of(search.teacher, (halves[1], halves[0]))
    played = []
    for one in alike:
        measured, _ = _fitted_damage(search, one.in_time.solution.plan, turned)
        played.append(replace(one, both_ways=(one.measured + measured) / 2))
    return sorted(played, key=lambda f: f.both_ways or 0.0)


def _among_all_edits(search: Search, found: _Found, pairs: Pairs) -> Solution:
    """A solution with the bound of its search among all edits: a neighbour's own holds without one of them."""
    solution = found.in_time.solution
    if found.without is None:
        return solution
    here = search.suited_to(found.attempt) or search
    bound = _solver(here, found.attempt, pairs)(found.in_time.solved_for).bound
    return replace(solution, bound=min(bound, solution.damage), proven=False)


def _fitted_damage(search: Search, plan: Plan, moments: _Moments) -> tuple[float, float]:
    """The damage of a plan on other moments than it is fitted on, and the seconds that this took."""
    began = time.monotonic()
    weights = search.fit(plan, moments.fitting, moments.runs)
    damage = measure_plan(search.teacher, plan, moments.measuring, weights, moments.reference).total
    return damage, time.monotonic() - began


def _off(search: Search, found: _Found, pairs: Pairs) -> float:
    """How many times its sum a plan damages as measured; 0 where terms of pairs sum up to nothing or less."""
    predicted = search.predicted(found.in_time.solution.options, pairs)
    return found.measured / predicted if predicted > 0 else 0.0


def _likely_factor(known: Sequence[tuple[_Found, float]], plan: Plan) -> float:
    """What a sum for a plan will be off by: as much as those for the plans found that are like it, 1 for the first.

    `known` are plans found with the factors that theirs were off by; those of 0 say nothing. Plans that share most of
    their edits err alike, where one by damages before any refit and one by those after do not.
    """
    edits = set(plan.edits.items())

    def likeness(other: _Found) -> float:
        theirs = set(other.in_time.solution.plan.edits.items())
        return len(edits & theirs) / max(len(edits | theirs), 1)

    told = [(other, factor) for other, factor in known if factor > 0]
    weights = [likeness(other) ** LIKENESS_POWER for other, _ in told]
    if not any(weights):  # none is like it: what the prompts differ by is in all of them
        weights = [1.0] * len(told)
    if not told:
        return 1.0
    logarithms = math.fsum(w * math.log(factor) for w, (_, factor) in zip(weights, told, strict=True))
    return math.exp(logarithms / math.fsum(weights))


def _solver(
    search: Search, attempt: Attempt, pairs: Pairs, patience: float = TIME_LIMIT_SECONDS
) -> Callable[[Sequence[Limit]], Solution]:
    known = {} if attempt.plain else pairs  # which hold for edits with what is fitted for them
    return lambda limits: search.solve(limits, known, attempt.belief, patience)


def _measure_pairs(
    search: Search,
    options: Sequence[Option],
    known: Mapping[frozenset[str], float],
    moments: _Moments,
) -> dict[frozenset[str], float]:
    """What those pairs add, fitted and measured together, whose errors' scalar products are the largest."""
    damages = search.damages
    candidates = [(a, b) for a, b in combinations(options, 2) if frozenset((a.name, b.name)) not in known]
    candidates.sort(key=lambda pair: abs(damages[pair[0].name].interaction(damages[pair[1].name])), reverse=True)
    found = {}
    for a, b in candidates[:PAIRS_PER_ROUND]:
        both = Plan({a.site: a.edit, b.site: b.edit})
        # Refitted as single edits are: where something is only taken out, and in full or not at all.
        plain = [o for o in (a, b) if not has_weights(o.edit)]
        units = [unit for unit, _ in filter(None, (absorber(search.teacher, o) for o in plain))]
        refit: RefitChoice = "full" if search.refit == "full" else "none"
        weights = fit_plan(search.teacher, both, moments.fitting, refit=refit, refit_at=units, runs=moments.runs)
        together = measure_plan(search.teacher, both, moments.measuring, weights, moments.reference).total
        one, other = damages[a.name].total, damages[b.name].total
        # The later fit can make up for the earlier edit, but not for more than there is: many such terms would else sum
        # up to less than nothing.
        found[frozenset((a.name, b.name))] = max(together - one - other, -min(one, other))
    return found
