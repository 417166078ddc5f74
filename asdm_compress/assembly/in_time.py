"""Search, build, time beside the teacher, and search again for less (or more) where the measured latency is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.options import teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.search import Solution
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.edits import Edit
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit, Resource, within
from asdm_compress.profiling.counting import count_macs
from asdm_compress.profiling.latency import median_ratio, time_side_by_side
from asdm_compress.profiling.profile import Profile, ProfileSettings, forward_pass

MAX_ROUNDS: Final = 4
SLACK: Final = 0.02  # of a latency limit that a plan may leave unspent while there are rounds left
# A measured ratio this little above its limit is taken as met: it is within what repeated timings differ by.
TIMING_TOLERANCE: Final = 0.01


@dataclass(frozen=True, slots=True)
class InTime:
    """A solution whose student, its convolutions not fitted yet, keeps the limits.

    `solved_for` are the limits that its proof holds for.
    """

    solution: Solution
    costs: Mapping[Resource, float]
    latency_ratio: float
    solved_for: tuple[Limit, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Clock:
    """What students of one teacher cost, and whether they keep the user's limits. Remembers what it has timed."""

    teacher: UNet2DConditionModel
    profile: Profile
    limits: Sequence[Limit]
    settings: ProfileSettings
    timed: dict[frozenset[tuple[str, Edit]], float] = field(default_factory=dict)

    @property
    def whole(self) -> dict[Resource, float]:
        """What the teacher costs."""
        return teacher_costs(self.profile)

    def costs(self, plan: Plan) -> tuple[dict[Resource, float], float]:
        """A plan's costs, latency as measured and the rest as counted, and its measured share of the latency."""
        student = assemble(self.teacher, plan)
        key = frozenset(plan.edits.items())
        if key not in self.timed:
            self.timed[key] = measured_ratio(self.teacher, student, self.settings)
        ratio = self.timed[key]
        parameters = sum(p.numel() for p in student.parameters())
        return {
            "latency": ratio * self.profile.latency,
            "macs": _macs(student, self.profile),
            "params": parameters,
        }, ratio

    def keeps(self, costs: Mapping[Resource, float]) -> bool:
        """Whether these costs keep the limits, as far as can be timed."""
        return within({**costs, "latency": costs["latency"] / (1 + TIMING_TOLERANCE)}, self.whole, self.limits)

    def leaves_much(self, costs: Mapping[Resource, float]) -> bool:
        """Whether a plan could be slower by far and still keep the limits."""
        timed = any(limit.resource == "latency" for limit in self.limits)
        return timed and within({**costs, "latency": costs["latency"] * (1 + SLACK)}, self.whole, self.limits)


def search_in_time(solve: Callable[[Sequence[Limit]], Solution], clock: Clock, inner: tuple[Limit, ...]) -> InTime:
    """Search under `inner`, tightened until the plan keeps the limits as measured, and relaxed where it does by far.

    Of the plans that keep them, the one of least predicted damage. Raises AsdmError with exit code 3 when no plan meets
    the limits, or none is measured to within `MAX_ROUNDS`.
    """
    whole = clock.whole
    ratios: list[float] = []
    best: InTime | None = None
    too_slow: tuple[Limit, ...] | None = None
    for number in range(1, MAX_ROUNDS + 1):
        try:
            solution = solve(inner)
        except AsdmError as error:
            if number == 1 or error.exit_code != ExitCode.INFEASIBLE:
                raise
            break
        costs, ratio = clock.costs(solution.plan)
        ratios.append(ratio)
        # Measured savings of parts can sum up to more than the whole takes.
        slower = costs["latency"] / max(solution.costs["latency"], 1e-9)
        if not clock.keeps(costs):
            too_slow = inner
            tighter = _scaled(inner, max(slower, 1 + TIMING_TOLERANCE), whole)
            inner = tighter if best is None else _between(best.solved_for, inner, whole)
            continue
        if best is None or solution.damage < best.solution.damage:
            best = InTime(solution, costs, ratio, inner, number)
        if not clock.leaves_much(costs):
            break
        # `inner` may be another search's, which was off by more than this one.
        looser = _scaled(clock.limits, slower, whole) if too_slow is None else _between(inner, too_slow, whole)
        if _share(looser, whole) <= _share(inner, whole) * (1 + TIMING_TOLERANCE / 2):
            break
        inner = looser
    if best is None:
        raise _missed(ratios, clock.limits)
    return best


def measured_ratio(teacher: UNet2DConditionModel, student: UNet2DConditionModel, settings: ProfileSettings) -> float:
    """The student's measured latency over the teacher's, timed in turns."""
    passes = [forward_pass(unet, settings) for unet in (student, teacher)]
    ours, theirs = time_side_by_side(passes, 2 * settings.repeats, teacher.device)
    return median_ratio(ours, theirs)


def _between(tight: Sequence[Limit], loose: Sequence[Limit], whole: Mapping[Resource, float]) -> tuple[Limit, ...]:
    """Latency limits half-way between two lists of the same limits."""
    halves = []
    for a, b in zip(tight, loose, strict=True):
        shares = [limit.absolute(whole[limit.resource]) / whole[limit.resource] for limit in (a, b)]
        halves.append(Limit("latency", sum(shares) / 2, relative=True) if a.resource == "latency" else a)
    return tuple(halves)


def _share(limits: Sequence[Limit], whole: Mapping[Resource, float]) -> float:
    """The share of the latency that limits leave."""
    return min(limit.absolute(whole["latency"]) / whole["latency"] for limit in limits if limit.resource == "latency")


def _scaled(limits: Sequence[Limit], factor: float, whole: Mapping[Resource, float]) -> tuple[Limit, ...]:
    """The limits with that of the latency divided by a factor."""
    scaled = []
    for limit in limits:
        share = limit.absolute(whole[limit.resource]) / whole[limit.resource] / factor
        timed = limit.resource == "latency"
        scaled.append(Limit("latency", min(1.0, max(1e-6, share)), relative=True) if timed else limit)
    return tuple(scaled)


def _missed(ratios: Sequence[float], limits: Sequence[Limit]) -> AsdmError:
    return AsdmError(
        f"no plan was measured to meet the budget {', '.join(str(limit) for limit in limits)}; the smallest in "
        f"{len(ratios)} rounds of search is latency={math.ceil(1e4 * min(ratios)) / 1e4:.4f}x",
        "Choose a larger budget. If something else is running on this machine, run again when it is quiet.",
        ExitCode.INFEASIBLE,
    )


def _macs(student: UNet2DConditionModel, profile: Profile) -> int:
    mark = profile.fingerprint
    size = mark.image_size // 8
    return count_macs(student, mark.batch, size, size, mark.text_tokens)[""].total
