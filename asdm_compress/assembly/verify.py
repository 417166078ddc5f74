"""Search, build, time beside the teacher, and search again for less where the measured latency misses its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import measure_plan
from asdm_compress.assembly.options import Option, teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.search import Pairs, Solution, solve
from asdm_compress.assembly.slot_start import fit_plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit, Resource, within
from asdm_compress.models.edits import SlotWeights
from asdm_compress.profiling.counting import count
from asdm_compress.profiling.latency import median_ratio, time_side_by_side
from asdm_compress.profiling.profile import Profile, ProfileSettings, forward_pass

MAX_ROUNDS = 4
DAMAGE_ROUNDS = 3
DAMAGE_TOLERANCE = 0.15  # of the predicted damage
PAIRS_PER_ROUND = 6
# A measured ratio this little above its limit is taken as met: it is within what repeated timings differ by.
TIMING_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Verified:
    """A solution, the student built from it, and what the student costs as measured (latency) and counted (the rest).

    `solved_for` are the limits that the solution's proof holds for: tighter ones than the user's where a first plan
    measured slower than predicted. Its damage holds the terms of `pairs` pairs; `measured_damage` is that of the whole
    plan on prompts that nothing was fitted on.
    """

    solution: Solution
    student: UNet2DConditionModel
    costs: Mapping[Resource, float]
    latency_ratio: float
    solved_for: tuple[Limit, ...]
    rounds: int
    slot_weights: SlotWeights
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


def search_verified(
    teacher: UNet2DConditionModel,
    profile: Profile,
    options: Sequence[Option],
    damages: Mapping[str, float],
    limits: Sequence[Limit],
    settings: ProfileSettings,
    calibration: Calibration,
) -> Verified:
    """The best plan whose built student, with its convolutions fitted, keeps every limit.

    Where the plan's measured damage is not what the sum of one-shot damages said, the pairs of edits that can have
    moved it most are measured together, and the search is made again with what they add. Of all plans found on the way,
    the one of least measured damage is returned. Raises AsdmError with exit code 3 when no plan meets the limits, or
    none is measured to within `MAX_ROUNDS`.
    """
    fitting, measuring = calibration.parts()
    pairs: dict[frozenset[str], float] = {}
    best: Verified | None = None
    inner = tuple(limits)
    for attempt in range(DAMAGE_ROUNDS):
        try:
            in_time = _search_in_time(teacher, profile, options, damages, limits, inner, settings, pairs)
        except AsdmError as error:
            if best is None or error.exit_code != ExitCode.INFEASIBLE:
                raise
            break
        inner, solution = in_time.solved_for, in_time.solution
        weights = fit_plan(teacher, solution.plan, fitting)
        measured = measure_plan(teacher, solution.plan, measuring, weights).total
        if best is None or measured < best.measured_damage:
            student = assemble(teacher, solution.plan, weights)
            best = Verified(
                solution, student, in_time.costs, in_time.latency_ratio, inner, in_time.rounds, weights, measured,
                len(pairs),
            )  # fmt: skip
        predicted = solution.damage
        if abs(measured - predicted) <= DAMAGE_TOLERANCE * predicted or attempt == DAMAGE_ROUNDS - 1:
            break
        new = _measure_pairs(teacher, solution.options, damages, pairs, fitting, measuring)
        if not new:
            break
        pairs |= new
    assert best is not None
    return best


def _measure_pairs(
    teacher: UNet2DConditionModel,
    options: Sequence[Option],
    damages: Mapping[str, float],
    known: Mapping[frozenset[str], float],
    fitting: Calibration,
    measuring: Calibration,
) -> dict[frozenset[str], float]:
    """What the pairs add that can add most: an interaction is at most 2 √(d₁ d₂), as the errors' scalar product."""
    candidates = [(a, b) for i, a in enumerate(options) for b in options[i + 1 :]]
    candidates = [(a, b) for a, b in candidates if frozenset((a.name, b.name)) not in known]
    candidates.sort(key=lambda pair: damages[pair[0].name] * damages[pair[1].name], reverse=True)
    found = {}
    for a, b in candidates[:PAIRS_PER_ROUND]:
        both = Plan({a.site: a.edit, b.site: b.edit})
        together = measure_plan(teacher, both, measuring, fit_plan(teacher, both, fitting)).total
        found[frozenset((a.name, b.name))] = together - damages[a.name] - damages[b.name]
    return found


def _search_in_time(
    teacher: UNet2DConditionModel,
    profile: Profile,
    options: Sequence[Option],
    damages: Mapping[str, float],
    limits: Sequence[Limit],
    inner: tuple[Limit, ...],
    settings: ProfileSettings,
    pairs: Pairs,
) -> _InTime:
    """Search under `inner`, tightened until the plan keeps `limits` as measured."""
    whole = teacher_costs(profile)
    ratio = 1.0
    for number in range(1, MAX_ROUNDS + 1):
        try:
            solution = solve(options, damages, whole, inner, pairs)
        except AsdmError as error:
            if number == 1 or error.exit_code != ExitCode.INFEASIBLE:
                raise
            raise _missed(number - 1, ratio, limits) from error
        student = assemble(teacher, solution.plan)
        ratio = measured_ratio(teacher, student, settings)
        costs: dict[Resource, float] = {
            "latency": ratio * profile.latency,
            "macs": _macs(student, profile),
            "params": sum(p.numel() for p in student.parameters()),
        }
        tolerated = {**costs, "latency": costs["latency"] / (1 + TIMING_TOLERANCE)}
        if within(tolerated, whole, limits):
            return _InTime(solution, costs, ratio, inner, number)
        inner = tuple(_tighter(limit, solution.costs, costs, whole) for limit in inner)
    raise _missed(MAX_ROUNDS, ratio, limits)


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
