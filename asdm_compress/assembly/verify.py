"""Search, build, time beside the teacher, and search again for less where the measured latency misses its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import Damage, measure_plan
from asdm_compress.assembly.option_fit import OPTION_MOMENTS, absorber
from asdm_compress.assembly.options import Option, teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import RefitChoice, fit_plan
from asdm_compress.assembly.search import Pairs, Solution, solve
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.edits import has_weights
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit, Resource, within
from asdm_compress.models.edits import SlotWeights
from asdm_compress.profiling.counting import count
from asdm_compress.profiling.latency import median_ratio, time_side_by_side
from asdm_compress.profiling.profile import Profile, ProfileSettings, forward_pass

MAX_ROUNDS = 4
SLACK = 0.02  # of a latency limit that a plan may leave unspent while there are rounds left
# The searches that are made until one is measured as predicted. How much of the errors' scalar products each believes:
# they hold for small errors, and come from few samples; and whether it may use what is fitted in the cut places, which
# can do worse on unseen prompts than one-shot damages tell.
ATTEMPTS = ((1.0, True), (1.0, False), (0.5, True), (0.0, True))
LEAST_ATTEMPTS = 2
DAMAGE_TOLERANCE = 0.15  # of the predicted damage
PAIRS_PER_ROUND = 4
# A measured ratio this little above its limit is taken as met: it is within what repeated timings differ by.
TIMING_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Verified:
    """A solution, the student built from it, and what the student costs as measured (latency) and counted (the rest).

    `solved_for` are the limits that the solution's proof holds for: tighter ones than the user's where a first plan
    measured slower than predicted. Its damage holds the terms of pairs, of which `pairs` were looked at.
    `predicted_damage` is that times the factor by which the other plans searched were measured to be off, and
    `measured_damage` that of the whole plan on prompts that were kept out of its fit. The student and `slot_weights`
    are fitted to all prompts.
    """

    solution: Solution
    student: UNet2DConditionModel
    costs: Mapping[Resource, float]
    latency_ratio: float
    solved_for: tuple[Limit, ...]
    rounds: int
    slot_weights: SlotWeights
    predicted_damage: float
    measured_damage: float
    pairs: int


@dataclass(frozen=True, slots=True)
class _InTime:
    """A solution whose student, its convolutions not fitted yet, keeps the limits."""

    solution: Solution
    costs: Mapping[Resource, float]
    latency_ratio: float
    solved_for: tuple[Limit, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Search:
    """Everything that a verified search is made with. `limits` are the user's."""

    teacher: UNet2DConditionModel
    profile: Profile
    options: Sequence[Option]
    damages: Mapping[str, Damage]
    limits: Sequence[Limit]
    settings: ProfileSettings
    calibration: Calibration
    refit: RefitChoice = "none"

    def fit(self, plan: Plan, calibration: Calibration) -> SlotWeights:
        """The weights of a plan fitted on some moments."""
        return fit_plan(self.teacher, plan, calibration, refit=self.refit)

    def only_taking_out(self) -> Search:
        """The same search among the edits that bring no weights along."""
        return replace(self, options=[option for option in self.options if not has_weights(option.edit)])

    def solve(self, inner: Sequence[Limit], pairs: Pairs, belief: float) -> Solution:
        """The best plan under other limits; of pairs not measured (`pairs`) `belief` of the scalar product counts."""
        totals = {name: damage.total for name, damage in self.damages.items()}

        def interaction(one: str, other: str) -> float:
            return belief * self.damages[one].interaction(self.damages[other])

        names = {option.name for option in self.options}
        known = {pair: term for pair, term in pairs.items() if pair <= names}
        whole = teacher_costs(self.profile)
        return solve(self.options, totals, whole, inner, known, interaction if belief else None)


def search_verified(search: Search) -> Verified:
    """The best plan whose built student, with its convolutions and narrowed modules fitted, keeps every limit.

    The search takes one-shot errors to add up (`Damage.interaction`). Where the plan's measured damage is not what that
    says, the pairs of edits that weigh most are fitted and measured together, and the search is made again with what
    they add and less belief in the rest; sums are taken times what other plans were off by. One search only takes out
    (see `ATTEMPTS`). Of all plans found on the way, the one of least measured damage is returned,
    fitted anew to all prompts. Raises AsdmError with exit code 3 when no plan meets the limits, or none is measured to
    within `MAX_ROUNDS`.
    """
    teacher = search.teacher
    fitting, measuring = search.calibration.parts()
    pairs: dict[frozenset[str], float] = {}
    best: Verified | None = None
    refused: AsdmError | None = None
    limits = {with_weights: tuple(search.limits) for _, with_weights in ATTEMPTS}
    off: dict[int, float] = {}
    best_number = 0
    for number, (belief, with_weights) in enumerate(ATTEMPTS, start=1):
        here = search if with_weights else search.only_taking_out()
        if not with_weights and len(here.options) == len(search.options):
            continue
        try:
            in_time = _search_in_time(here, limits[with_weights], pairs, belief)
        except AsdmError as error:
            if error.exit_code != ExitCode.INFEASIBLE:
                raise
            refused = refused or error
            continue
        limits[with_weights], solution = in_time.solved_for, in_time.solution
        weights = search.fit(solution.plan, fitting)
        measured = measure_plan(teacher, solution.plan, measuring, weights).total
        predicted = solution.damage * (median(off.values()) if off else 1.0)
        if best is None or measured < best.measured_damage:
            best_number, student = number, assemble(teacher, solution.plan, weights)
            best = Verified(
                solution, student, in_time.costs, in_time.latency_ratio, in_time.solved_for, in_time.rounds, weights,
                predicted, measured, solution.pairs,
            )  # fmt: skip
        off[number] = measured / max(solution.damage, 1e-30)
        if number >= LEAST_ATTEMPTS and abs(measured - predicted) <= DAMAGE_TOLERANCE * predicted:
            break
        if with_weights and number < len(ATTEMPTS):
            pairs |= _measure_pairs(search, solution.options, pairs, fitting, measuring)
    if best is None:
        assert refused is not None
        raise refused
    others = [factor for number, factor in off.items() if number != best_number]
    predicted = best.solution.damage * (median(others) if others else 1.0)
    final = search.fit(best.solution.plan, search.calibration)
    return replace(
        best, predicted_damage=predicted, slot_weights=final, student=assemble(teacher, best.solution.plan, final)
    )


def _measure_pairs(
    search: Search,
    options: Sequence[Option],
    known: Mapping[frozenset[str], float],
    fitting: Calibration,
    measuring: Calibration,
) -> dict[frozenset[str], float]:
    """What those pairs add, fitted and measured together, whose errors' scalar products are the largest."""
    damages = search.damages
    candidates = [(a, b) for i, a in enumerate(options) for b in options[i + 1 :]]
    candidates = [(a, b) for a, b in candidates if frozenset((a.name, b.name)) not in known]
    candidates.sort(key=lambda pair: abs(damages[pair[0].name].interaction(damages[pair[1].name])), reverse=True)
    found = {}
    fitting = fitting.thinned(OPTION_MOMENTS)  # as single edits are
    for a, b in candidates[:PAIRS_PER_ROUND]:
        both = Plan({a.site: a.edit, b.site: b.edit})
        units = [unit for unit, _ in filter(None, (absorber(search.teacher, o) for o in (a, b)))]
        weights = fit_plan(search.teacher, both, fitting, refit=search.refit, refit_at=units)
        together = measure_plan(search.teacher, both, measuring, weights).total
        one, other = damages[a.name].total, damages[b.name].total
        # The later fit can make up for the earlier edit, but not for more than there is: many such terms would else sum
        # up to less than nothing.
        found[frozenset((a.name, b.name))] = max(together - one - other, -min(one, other))
    return found


def _search_in_time(search: Search, inner: tuple[Limit, ...], pairs: Pairs, belief: float) -> _InTime:
    """Search under `inner`, tightened until the plan keeps the limits as measured, and relaxed where it does by far.

    Of the plans that keep them, the one of least predicted damage.
    """
    profile, limits = search.profile, search.limits
    whole = teacher_costs(profile)
    ratio, best, too_slow, timed = 1.0, None, None, 0
    for number in range(1, MAX_ROUNDS + 1):
        try:
            solution = search.solve(inner, pairs, belief)
        except AsdmError as error:
            if number == 1 or error.exit_code != ExitCode.INFEASIBLE:
                raise
            break
        student = assemble(search.teacher, solution.plan)
        ratio, timed = measured_ratio(search.teacher, student, search.settings), number
        costs: dict[Resource, float] = {
            "latency": ratio * profile.latency,
            "macs": _macs(student, profile),
            "params": sum(p.numel() for p in student.parameters()),
        }
        tolerated = {**costs, "latency": costs["latency"] / (1 + TIMING_TOLERANCE)}
        if not within(tolerated, whole, limits):
            too_slow = inner
            tighter = tuple(_tighter(limit, solution.costs, costs, whole) for limit in inner)
            inner = tighter if best is None else _between(best.solved_for, inner, whole)
            continue
        if best is None or solution.damage < best.solution.damage:
            best = _InTime(solution, costs, ratio, inner, number)
        if too_slow is None or not _leaves_much(costs, whole, limits):
            break
        inner = _between(inner, too_slow, whole)
    if best is None:
        raise _missed(timed, ratio, limits)
    return best


def _leaves_much(costs: Mapping[Resource, float], whole: Mapping[Resource, float], limits: Sequence[Limit]) -> bool:
    """Whether a plan could be slower by far and still keep the limits."""
    slower = {**costs, "latency": costs["latency"] * (1 + SLACK)}
    return within(slower, whole, limits)


def _between(tight: Sequence[Limit], loose: Sequence[Limit], whole: Mapping[Resource, float]) -> tuple[Limit, ...]:
    """Latency limits half-way between two lists of the same limits."""
    halves = []
    for a, b in zip(tight, loose, strict=True):
        shares = [limit.absolute(whole[limit.resource]) / whole[limit.resource] for limit in (a, b)]
        halves.append(Limit("latency", sum(shares) / 2, relative=True) if a.resource == "latency" else a)
    return tuple(halves)


def measured_ratio(teacher: UNet2DConditionModel, student: UNet2DConditionModel, settings: ProfileSettings) -> float:
    """The student's measured latency over the teacher's, timed in turns."""
    passes = [forward_pass(unet, settings) for unet in (student, teacher)]
    ours, theirs = time_side_by_side(passes, 2 * settings.repeats, teacher.device)
    return median_ratio(ours, theirs)


def _tighter(
    limit: Limit, predicted: Mapping[Resource, float], found: Mapping[Resource, float], whole: Mapping[Resource, float]
) -> Limit:
    """For latency, the limit less the factor by which the plan came out slower than predicted."""
    if limit.resource != "latency":
        return limit
    share = limit.absolute(whole["latency"]) / whole["latency"]
    slower = max(found["latency"] / predicted["latency"], 1 + TIMING_TOLERANCE)
    return Limit("latency", max(1e-6, share / slower), relative=True)


def _missed(rounds: int, ratio: float, limits: Sequence[Limit]) -> AsdmError:
    return AsdmError(
        f"after {rounds} rounds of search the measured latency is still {ratio:.3f}x, above the budget "
        f"{', '.join(str(limit) for limit in limits)}",
        "Is something else running on this machine? Run again when it is quiet, or choose a larger budget.",
        ExitCode.INFEASIBLE,
    )


def _macs(student: UNet2DConditionModel, profile: Profile) -> int:
    mark = profile.fingerprint
    size = mark.image_size // 8
    return count(student, mark.batch, size, size, mark.text_tokens).macs[""].total
