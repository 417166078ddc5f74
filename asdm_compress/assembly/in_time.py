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
SLACK: Final = 0.005  # of its time, that a plan may leave unspent while there are rounds left
# A measured ratio this little above its limit is taken as met: it is within what repeated timings differ by.
TIMING_TOLERANCE: Final = 0.01
SLOPES: Final = (0.6, 1.2)  # between which measured time goes with predicted time; what is further off is noise


@dataclass(frozen=True, slots=True)
class InTime:
    """A solution whose student, its convolutions not fitted yet, keeps the limits.

    `solved_for` are the limits that its proof holds for, `slower` how many times the predicted latency it takes.
    """

    solution: Solution
    costs: Mapping[Resource, float]
    latency_ratio: float
    solved_for: tuple[Limit, ...]
    rounds: int
    slower: float


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
        """Whether a plan could be slower and still keep the limits."""
        timed = any(limit.resource == "latency" for limit in self.limits)
        return timed and within({**costs, "latency": costs["latency"] * (1 + SLACK)}, self.whole, self.limits)

    def asked_for(self, slower: float) -> tuple[Limit, ...]:
        """The limits to search under where plans take `slower` times their predicted latency."""
        return _asked(self.limits, _share(self.limits, self.whole) / slower)


def search_in_time(solve: Callable[[Sequence[Limit]], Solution], clock: Clock, inner: tuple[Limit, ...]) -> InTime:
    """Search under `inner`, tightened until the plan keeps the limits as measured, and relaxed where it leaves time.

    What is asked for next is told by how measured latencies went with predicted ones. Of the plans that keep the
    limits, the one of least predicted damage. Raises AsdmError with exit code 3 when no plan meets the limits, or none
    is measured to within `MAX_ROUNDS`.
    """
    whole = clock.whole
    tried: list[tuple[float, float]] = []  # shares of the latency, as predicted and as measured
    best: InTime | None = None
    fast, too_slow = 0.0, math.inf  # the shares asked for: the most of which a plan was in time, the least where not
    for number in range(1, MAX_ROUNDS + 1):
        try:
            solution = solve(inner)
        except AsdmError as error:
            if number == 1 or error.exit_code != ExitCode.INFEASIBLE:
                raise
            break
        costs, ratio = clock.costs(solution.plan)
        # Measured savings of parts can sum up to more than the whole takes.
        predicted = max(solution.costs["latency"] / whole["latency"], 1e-9)
        tried.append((predicted, ratio))
        asked = _share(inner, whole)
        in_time = clock.keeps(costs)
        if in_time:
            if best is None or solution.damage < best.solution.damage:
                best = InTime(solution, costs, ratio, inner, number, ratio / predicted)
            if not clock.leaves_much(costs):
                break
            fast = max(fast, asked)
        else:
            # The plan is the best for all that lies between what was asked for and what it takes.
            too_slow = min(too_slow, asked, predicted)
        aim = _next(tried, _share(clock.limits, whole))
        if not in_time:
            aim = min(aim, asked * (1 - TIMING_TOLERANCE))
        if not fast < aim < too_slow:
            aim = (fast + too_slow) / 2 if math.isfinite(too_slow) and fast else aim
        if (in_time and aim <= asked * (1 + SLACK / 2)) or too_slow <= fast * (1 + SLACK / 2):
            break
        inner = _asked(clock.limits, aim)
    if best is None:
        raise _missed([measured for _, measured in tried], clock.limits)
    return best


def _next(tried: Sequence[tuple[float, float]], limit: float) -> float:
    """The predicted share whose measured one should be the limit: by the last plan's ratio of the two, or, where two
    plans were different enough to tell, by the line through them."""
    predicted, measured = tried[-1]
    for before, then in reversed(tried[:-1]):
        if abs(predicted / before - 1) > TIMING_TOLERANCE / 2:
            low, high = SLOPES
            slope = min(max((measured - then) / (predicted - before), low), high)
            return max(predicted - (measured - limit) / slope, 1e-6)
    return limit * predicted / measured


def measured_ratio(teacher: UNet2DConditionModel, student: UNet2DConditionModel, settings: ProfileSettings) -> float:
    """The student's measured latency over the teacher's, timed in turns."""
    passes = [forward_pass(unet, settings) for unet in (student, teacher)]
    ours, theirs = time_side_by_side(passes, 2 * settings.repeats, teacher.device)
    return median_ratio(ours, theirs)


def _share(limits: Sequence[Limit], whole: Mapping[Resource, float]) -> float:
    """The share of the latency that limits leave."""
    return min((limit.absolute(whole["latency"]) / whole["latency"] for limit in limits if limit.resource == "latency"),
               default=1.0)  # fmt: skip


def _asked(limits: Sequence[Limit], share: float) -> tuple[Limit, ...]:
    """The limits with another share of the latency."""
    latency = Limit("latency", min(1.0, max(1e-6, share)), relative=True)
    return tuple(latency if limit.resource == "latency" else limit for limit in limits)


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
