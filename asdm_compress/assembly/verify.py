"""Search, build, time beside the teacher, and search again for less where the measured latency misses its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.options import Option, teacher_costs
from asdm_compress.assembly.search import Solution, solve
from asdm_compress.assembly.slot_start import fit_plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit, Resource, within
from asdm_compress.models.edits import SlotWeights
from asdm_compress.profiling.counting import count
from asdm_compress.profiling.latency import median_ratio, time_side_by_side
from asdm_compress.profiling.profile import Profile, ProfileSettings, forward_pass

MAX_ROUNDS = 4
# A measured ratio this little above its limit is taken as met: it is within what repeated timings differ by.
TIMING_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Verified:
    """A solution, the student built from it, and what the student costs as measured (latency) and counted (the rest).

    `solved_for` are the limits that the solution's proof holds for: tighter ones than the user's where a first plan
    measured slower than predicted.
    """

    solution: Solution
    student: UNet2DConditionModel
    costs: Mapping[Resource, float]
    latency_ratio: float
    solved_for: tuple[Limit, ...]
    rounds: int
    slot_weights: SlotWeights


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

    Raises AsdmError with exit code 3 when no plan meets the limits, or none is measured to within `MAX_ROUNDS`.
    """
    whole = teacher_costs(profile)
    inner = tuple(limits)
    ratio = 1.0
    for number in range(1, MAX_ROUNDS + 1):
        try:
            solution = solve(options, damages, whole, inner)
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
            weights = fit_plan(teacher, solution.plan, calibration)
            student = assemble(teacher, solution.plan, weights)
            return Verified(solution, student, costs, ratio, inner, number, weights)
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
