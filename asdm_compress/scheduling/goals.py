"""Chooses a schedule for a goal: the best within a time, or the fastest that keeps a quality, on validation prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.modes import Mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.scheduling.fits import Fit, Fitter, only_fitted
from asdm_compress.scheduling.menu import WHOLE, Choice, Kind, Menu, kind_of, with_corrections
from asdm_compress.scheduling.rollouts import CONFIDENCE, Judge, Score
from asdm_compress.scheduling.search import EXCHANGES, FEW_EXCHANGES, HOT, Corner, Front, improved
from asdm_compress.scheduling.surrogate import COHERENT, Surrogate
from asdm_compress.scheduling.timing import KindTimes
from asdm_compress.scheduling.ways import Way, cheapest_cache, scheduled, uniform_caches

Metric = Literal["psnr", "ssim"]
SHARES: Final = 24  # of the time, that are tried for a least quality
# How much the errors of different steps add up is not known: schedules are searched for several answers.
COHERENCES: Final = (COHERENT, 0.0, 1.0)
# Exchanges end in different schedules, which runs rank otherwise than the surrogate does: by exchanges a step and heat,
# annealed ones, which may be far better than the front's or have errors that cancel on the calibration prompts alone,
# and ones near to the front's. The first is all that is searched where a quality is the goal.
SEARCHES: Final = ((EXCHANGES, HOT), (EXCHANGES, HOT), (FEW_EXCHANGES, 0.0), (FEW_EXCHANGES, 0.0))


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit of time, or the least mean PSNR in dB or SSIM that a schedule may have."""

    limit: Limit | None = None
    metric: Metric = "psnr"
    least: float = 0.0

    def share(self, full_run: float) -> float | None:
        """The limit as a share of the full run's seconds; None where quality is the goal."""
        return None if self.limit is None else self.limit.absolute(full_run) / full_run

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return {"budget": str(self.limit)} if self.limit else {f"min_{self.metric}": self.least}

    def confidence(self, validation: Score, test: Score) -> str | None:
        """What is known of a least quality."""
        if self.limit is not None:
            return None
        metric, least, known = self.metric, self.least, test.lower(self.metric)
        surely = f", with {CONFIDENCE:.0%} confidence at least {known:.4g}" if math.isfinite(known) else ""
        short = "" if test.mean(metric) >= least else f", which is less than the {least:g} that was asked for"
        return (
            f"chosen so that the validation prompts say with {CONFIDENCE:.0%} confidence, before the choice among "
            f"schedules, that the mean {metric} is at least {validation.lower(metric):.4g}; on test prompts, which "
            f"chose nothing, it is {test.mean(metric):.4g}{surely}{short}"
        )


def goal_of(limits: Sequence[Limit], min_psnr: float | None, min_ssim: float | None) -> Goal:
    """The goal that a user names; raises AsdmError for none, for several, and for budgets other than of time."""
    given = [bool(limits), min_psnr is not None, min_ssim is not None]
    if sum(given) != 1:
        raise AsdmError("calibrate takes one goal", "Give --budget latency=0.5x, or --min-psnr 40, or --min-ssim 0.98.")
    if limits:
        if len(limits) != 1 or limits[0].resource != "latency":
            raise AsdmError("schedules are calibrated for time alone", "Use --budget latency=0.5x.")
        return Goal(limit=limits[0])
    if min_psnr is not None and not 0 < min_psnr < math.inf:
        raise AsdmError(f"a PSNR of {min_psnr:g} dB cannot be kept", "Give decibels, for example --min-psnr 40.")
    if min_ssim is not None and not 0 < min_ssim < 1:
        raise AsdmError(f"an SSIM of {min_ssim:g} cannot be kept", "Give a share below 1, for example --min-ssim 0.98.")
    if min_psnr is not None:
        return Goal(metric="psnr", least=min_psnr)
    assert min_ssim is not None
    return Goal(metric="ssim", least=min_ssim)


@dataclass(frozen=True, slots=True)
class Plan:
    """A way that was chosen, with the menu's choices where the search found it, and what the surrogate says.

    `cost` is the summed cost of single steps of the dynamic program's own schedule for the time, or of its cheapest
    where that takes more, `bound` what none can be under, `damage` the joint damage of the way without its corrections,
    which are `fit`.
    """

    way: Way
    choices: tuple[Choice, ...] | None
    damage: float | None
    cost: float
    bound: float
    fit: Fit | None = None

    def actions(self, steps: int) -> tuple[Action, ...]:
        """What every step does."""
        rule = self.way.rule
        assert rule is not None
        return rule.actions(steps) if isinstance(rule, Mode) else rule.actions


@dataclass(frozen=True, slots=True)
class Choosing:
    """What a choice is made from. `every` and `every_times` are of all cuts, not only of those that are searched.

    `corrected_front` is the front under the times of corrected cuts; without a `fitter` nothing is corrected.
    """

    surrogate: Surrogate
    times: KindTimes
    front: Front
    judge: Judge
    every: Menu
    every_times: KindTimes
    corrected_front: Front
    fitter: Fitter | None

    def candidates(self, share: float, wide: bool = True) -> list[Plan]:
        """Schedules within a share of the time: found from the front's corner, and `wide`, regular ones too.

        Raises AsdmError with exit code 3 where there is none.
        """
        # A regular schedule may hold what it inherits for longer than was measured, and so take less than the front's.
        corner = self.front.best(share) or self.front.cheapest
        found = [plan for some in self._searched(self.times, self.front, share, wide) for plan in some]
        if wide:
            ways = uniform_caches(self.every, self.every_times, share, LINEAR)
            ways += uniform_caches(self.every, self.every_times, share)
            found += [Plan(way, None, None, corner.cost, self.front.bound(share)) for way in ways]
        if not found:
            raise too_small(share, self.front.cheapest, self.times, cheapest_cache(self.every, self.every_times))
        return found

    def fitted(self, share: float, plain: Sequence[Plan], wide: bool = True) -> list[Plan]:
        """Schedules within a share of the time with corrections, which cost time too, fitted along each of them.

        The search's own under these times, and where a regular schedule was the best of `plain`, its corrected form.
        """
        if self.fitter is None:
            return []
        # Fitting takes longer than trying: of each coherence only the schedule of least damage, and one near the front.
        times, front = self.times.corrected(), self.corrected_front
        promising = [some[0] for some in self._searched(times, front, share, wide)]
        if wide and (corner := front.best(share)) is not None:
            near = improved(self.surrogate, times, corner.choices, share, COHERENT, FEW_EXCHANGES, 0.0)
            if near not in [plan.choices for plan in promising]:
                promising.append(self._plan(times, near, corner, front.bound(share)))
        best = self.best(plain)
        if best.choices is None:
            (light,) = {light for light, _ in self._kinds(best) if light != WHOLE}
            ways = uniform_caches(self.every.only((light,)), self.every_times.corrected().only((light,)), share, LINEAR)
            promising += [Plan(way, None, None, best.cost, best.bound) for way in ways]
        return [plan for plan in map(self._corrected, promising) if plan is not None]

    def _searched(self, times: KindTimes, front: Front, share: float, wide: bool) -> list[list[Plan]]:
        """Different schedules for every coherence, or the first of them, those of least damage under it first.

        The front's own is the last of the first coherence.
        """
        corner = front.best(share)
        if corner is None:
            return []
        bound, seen = front.bound(share), set[tuple[Choice, ...]]()
        found: list[list[Plan]] = []
        for coherent in COHERENCES if wide else COHERENCES[:1]:
            ends = [
                improved(self.surrogate, times, corner.choices, share, coherent, exchanges, hot, seed)
                for seed, (exchanges, hot) in enumerate(SEARCHES if wide else SEARCHES[:1])
            ]
            ends.sort(key=lambda choices: self.surrogate.damage(choices, coherent))
            new = list(dict.fromkeys([*ends, *([] if found else [corner.choices])]))
            plans = [self._plan(times, choices, corner, bound) for choices in new if choices not in seen]
            seen |= set(new)
            if plans:
                found.append(plans)
        return found

    def _plan(self, times: KindTimes, choices: tuple[Choice, ...], corner: Corner, bound: float) -> Plan:
        way = scheduled(self.surrogate.menu, times, choices, "calibrated")
        return Plan(way, choices, self.surrogate.damage(choices), corner.cost, bound)

    def _corrected(self, plan: Plan) -> Plan | None:
        """A plan with corrections fitted along it; None where there is nothing that they could make better."""
        assert self.fitter is not None
        actions = with_corrections(plan.actions(self.times.steps))
        fit = self.fitter.fit(actions)
        if not fit.corrections:
            return None
        actions = only_fitted(actions, fit)
        schedule = Schedule(actions, fit.corrections)
        way = Way(f"{plan.way.name}, corrected", len(actions), self.seconds_of(actions), schedule)
        return replace(plan, way=way, fit=fit)

    def seconds_of(self, actions: Sequence[Action]) -> float:
        """The predicted time of a run of these actions."""
        return self.every_times.outside + sum(self.step_seconds(actions))

    def step_seconds(self, actions: Sequence[Action]) -> list[float]:
        """The predicted time of every step."""
        plain, corrected = self.every_times, self.every_times.corrected()
        return [
            (corrected if any(e.corrected for e in action.inherits) else plain).seconds[kind_of(self.every, action)]
            for action in actions
        ]

    def _kinds(self, plan: Plan) -> list[Kind]:
        return [kind_of(self.every, action) for action in plan.actions(self.times.steps)]

    def best(self, plans: Sequence[Plan], metric: Metric = "psnr") -> Plan:
        """The plan that is nearest to the full run on validation prompts."""
        best = self.judge.race([plan.way for plan in plans], metric)[0]
        return next(plan for plan in plans if plan.way is best)

    def chosen(self, share: float, metric: Metric = "psnr", wide: bool = True) -> Plan:
        """The best plan within a share of the time, with or without corrections."""
        plain = self.candidates(share, wide)
        return self.best([*plain, *self.fitted(share, plain, wide)], metric)


def choose_schedule(choosing: Choosing, goal: Goal, share: float | None) -> Plan:
    """The best plan within `share` of the time, or without one the fastest that keeps the goal's quality.

    Raises AsdmError with exit code 3 where there is none.
    """
    if share is not None:
        return choosing.chosen(share)
    shares = np.linspace(choosing.front.cheapest.share, 1.0, SHARES)
    low, high = 0, len(shares) - 1
    kept: Plan | None = None
    most = -math.inf
    while low <= high:
        middle = (low + high) // 2
        plan = choosing.chosen(float(shares[middle]), goal.metric, wide=False)
        surely = choosing.judge.score(plan.way).lower(goal.metric)
        most = max(most, surely)
        if surely >= goal.least:
            kept, high = plan, middle - 1
        else:
            low = middle + 1
    if kept is None:
        raise AsdmError(
            f"no schedule keeps a mean {goal.metric} of {goal.least:g} with {CONFIDENCE:.0%} confidence; the most that "
            f"one surely has is {most:.4g}",
            "Ask for less, or validate on more prompts with --validation-prompts.",
            ExitCode.INFEASIBLE,
        )
    return kept


def too_small(share: float, cheapest: Corner, times: KindTimes, regular: Way | None = None) -> AsdmError:
    """The error for a time that no schedule keeps, with the cheapest of the search and the cheapest regular one."""
    seconds = times.run(cheapest.choices)
    what = f"computes {sum(choice.light < 0 for choice in cheapest.choices)} of {len(cheapest.choices)} steps"
    if regular is not None and regular.seconds < seconds:
        seconds, what = regular.seconds, f"is {regular.name}"
    return AsdmError(
        f"no schedule takes {share:.4g}x of the time",
        f"The cheapest {what} and takes latency={seconds / times.full_run:.4f}x ({seconds:.3g} s). Allow more, or "
        "sample with fewer steps.",
        ExitCode.INFEASIBLE,
    )
