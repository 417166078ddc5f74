"""The search of `calibrate --members`: measures around the teacher, solves, measures what comes out, and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.inheritance.actions import Action
from asdm_compress.scheduling.swaps import Bench, Swaps
from asdm_compress.scheduling.switch_search import Found, small_first, solve
from asdm_compress.scheduling.switch_times import SKIP, StepTimes
from asdm_compress.workflows.calibrate import MOST_ROUNDS, keeps_in_time, over_limit
from asdm_compress.workflows.progress import Progress

REFINED: Final = 3  # times that the exchanges are measured around the best schedule so far
NEAR: Final = 3  # a share of the steps, one in so many, that one refinement changes


@dataclass(frozen=True, slots=True)
class Round:
    """One solution: what the model of the error says, its bound, and what was measured on calibration prompts."""

    found: Found
    measured: float

    def as_json(self) -> dict[str, Any]:
        """For files."""
        found = self.found
        return {
            "predicted": found.predicted, "bound": found.bound, "proven": found.proven,
            "most_changes": found.most_changes, "measured": self.measured,
            "steps": [action.name for action in found.actions],
        }  # fmt: skip


class MembersSearch:
    """Measures around the teacher, solves, measures what comes out, and again around that."""

    def __init__(
        self,
        bench: Bench,
        truth: np.ndarray,
        validation: Bench,
        validated: np.ndarray,
        choices: Sequence[Action],
        times: StepTimes,
        progress: Progress,
    ) -> None:
        self.bench, self.truth, self.choices, self.times, self.progress = bench, truth, choices, times, progress
        self.validation, self.validated = validation, validated
        self.rounds: list[Round] = []
        self._scores: dict[tuple[Action, ...], float] = {}
        self._around: list[Swaps] = []

    @property
    def around_teacher(self) -> Swaps:
        """What each exchange does to the teacher's own runs."""
        return self._around[0]

    def run(self, teacher: tuple[Action, ...], budget: float) -> None:
        """Find schedules within a time; raises AsdmError, exit code 3, where there is none."""
        around, most = teacher, None
        for number in range(1 + REFINED):
            with self.progress.bar(f"Measuring every member at every step, {number + 1} of {1 + REFINED}") as bar:
                self._around.append(self.bench.measure(around, self.choices, self.truth, bar))
            with self.progress.stage("Solving"):
                solved = solve(self._around[-1], self.times, budget, most)
            if solved is None and not self.rounds:
                raise self._too_small(budget, len(teacher))
            if solved is None or any(solved.actions == r.found.actions for r in self.rounds):
                break
            self._add(solved)
            best = min(self.rounds, key=lambda r: r.measured)
            if any(swaps.schedule == best.found.actions for swaps in self._around):
                break
            around, most = best.found.actions, max(2, len(teacher) // NEAR)

    def solve_again(self, budget: float) -> None:
        """Schedules for less time, from what is measured already."""
        for swaps in self._around:
            solved = solve(swaps, self.times, budget)
            if solved is not None and all(solved.actions != r.found.actions for r in self.rounds):
                self._add(solved)

    def within(
        self, share: float, full: float, measure: Callable[[tuple[Action, ...]], float]
    ) -> tuple[tuple[Action, ...], float]:
        """The best schedule that takes at most a share of `full` seconds as `measure` says, and what that says of it.

        Where one takes more, others are solved for in less. Raises AsdmError with exit code 3 where none is found.
        """
        aim, timed = share, dict[tuple[Action, ...], float]()
        for number in range(1 + MOST_ROUNDS):
            if number:
                self.solve_again(aim * full)
            best = self.best(aim * full)
            if best in timed:
                break
            timed[best] = measured = measure(best)
            if keeps_in_time(measured, share):
                return best, measured
            aim = min(aim * 0.995, share * self.times.run(best) / full / measured)
        raise over_limit(share, min(timed.values()))

    def best(self, budget: float) -> tuple[Action, ...]:
        """Of all schedules within a time that were found, and T-Stitch's, the nearest on validation prompts.

        Where none is within it, the fastest.
        """
        found = [r.found.actions for r in self.rounds]
        found += [order for order in self._orders(budget) if order not in found]
        within = [actions for actions in found if self.times.run(actions) <= budget * (1 + 1e-9)]
        return min(within, key=self._score) if within else min(found, key=self.times.run)

    def _orders(self, budget: float) -> list[tuple[Action, ...]]:
        teacher, *others = (choice for choice in self.choices if not choice.skips)
        steps = len(self._around[0].schedule)
        orders = (small_first(other, teacher, steps, self.times, budget) for other in others)
        return [order for order in orders if order is not None]

    def _add(self, found: Found) -> None:
        with self.progress.stage("Verifying by measurement"):
            error = self.bench.final_latents(found.actions) - self.truth
        self.rounds.append(Round(found, float(np.square(error, dtype=np.float64).mean())))

    def _score(self, actions: tuple[Action, ...]) -> float:
        if actions not in self._scores:
            error = self.validation.final_latents(actions) - self.validated
            self._scores[actions] = float(np.square(error, dtype=np.float64).mean())
        return self._scores[actions]

    def _too_small(self, budget: float, steps: int) -> AsdmError:
        full = self.times.full(steps)
        cheapest = min(self.times.seconds[choice] for choice in self.choices if not choice.skips)
        skipped = max((steps - 1) // 2, 0)
        least = self.times.outside + (steps - skipped) * cheapest + skipped * self.times.seconds[SKIP]
        return AsdmError(
            f"no order of these members takes {budget / full:.4g}x of the teacher's time",
            f"About latency={least / full:.3f}x can be reached. Allow more, or give a smaller member.",
            ExitCode.INFEASIBLE,
        )
