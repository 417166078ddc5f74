"""Finds schedules of members, inheritance and guidance that come near to a full run within a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.store import measurement_folder
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.loading import with_parts
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.scheduling.goals import Choosing
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.rollouts import Judge
from asdm_compress.scheduling.swaps import Bench, Swaps, Values
from asdm_compress.scheduling.switch_search import solve
from asdm_compress.scheduling.switch_times import StepTimes
from asdm_compress.scheduling.timing import KindTimes
from asdm_compress.scheduling.ways import Way
from asdm_compress.workflows.calibrate import VALIDATION_SEED, CalibrateSettings, prepare
from asdm_compress.workflows.calibrated import Splits
from asdm_compress.workflows.candidates import schedule_way
from asdm_compress.workflows.progress import Progress

REFINED: Final = 1  # times that a schedule is measured around again
MOST_CHANGES: Final = 3  # in one refinement, one step in so many
SLIGHTLY: Final = 1.2  # times the budget: schedules that take no more are solved again for less
Again = Callable[[float], Way | None]  # the way for a loop of other seconds, from the same measurements


@dataclass(frozen=True)
class Target:
    """A full run of the teacher's that schedules are to come near to: in so many steps of a sampler, None its own.

    `judge` compares pictures with its own, `truth` is its final latents on the calibration prompts.
    """

    steps: int
    solver: str | None
    judge: Judge
    truth: Values


@dataclass
class ScheduleSearch:
    """What schedules are searched with; `members` are by name, the teacher the first, `one_batch` is what is timed."""

    pipeline: StableDiffusionPipeline
    members: Mapping[str, UNet2DConditionModel]
    settings: CalibrateSettings
    splits: Splits
    one_batch: Tensor
    times: StepTimes
    progress: Progress
    _again: dict[tuple[str, str], Again] = field(default_factory=dict)  # by role and key of a way
    _kinds: dict[Action, KindTimes] = field(default_factory=dict)  # by member, for all samplers and numbers of steps

    @property
    def teacher(self) -> Action:
        """A full step of the teacher's."""
        return Action(member=next(iter(self.members)))

    def with_sampler(self, solver: str | None) -> StableDiffusionPipeline:
        """The pipeline with another sampler, or its own."""
        parts = {"scheduler": make_scheduler(solver, self.pipeline)} if solver else {}
        return with_parts(self.pipeline, **parts)

    def full_run(self, steps: int, solver: str | None) -> Way:
        """The teacher's, by the name that people give it."""
        name = f"{steps} steps of {solver or 'its own sampler'}"
        return Way(name, steps, self.times.full(steps), Schedule((self.teacher,) * steps), solver)

    def target(self, steps: int, solver: str | None, prompts: Sequence[str]) -> Target:
        """A full run, compared with on these validation prompts."""
        here = self.with_sampler(solver)
        sampling = replace(self.settings.sampling, steps=steps)
        timeline = sampler_timeline(here, steps)
        with self.progress.stage(f"Sampling {steps} steps of {solver or 'its own sampler'} in full"):
            bench = Bench(here, timeline, self.splits.calibration, sampling, None, self.settings.batch)
            truth = bench.final_latents((self.teacher,) * steps)
            seeds = replace(sampling, seed=VALIDATION_SEED)
            folder = measurement_folder(here, prompts, seeds, 0)
            judge = Judge(here, prompts, seeds, folder, self.settings.batch, self.full_run(steps, solver))
        return Target(steps, solver, judge, truth)

    def joint(
        self,
        steps: int,
        solver: str | None,
        budget: float,
        target: Target,
        choices: Sequence[Action] | None = None,
        role: str = "joint",
        refined: int = REFINED,
    ) -> list[tuple[str, Way]]:
        """Schedules of one number of steps in which members, inheritance and guidance are chosen together.

        The loop of a run takes at most `budget` seconds. `choices` are some of what a step may do, the first the
        teacher's whole step; all of it by default. A schedule is measured around `refined` times.
        """
        here = self.with_sampler(solver)
        sampling = replace(self.settings.sampling, steps=steps)
        timeline = sampler_timeline(here, steps)
        folder = measurement_folder(here, self.splits.calibration, sampling, 0)
        choices = tuple(self.times.seconds) if choices is None else tuple(choices)
        bench = Bench(here, timeline, self.splits.calibration, sampling, folder, self.settings.batch)
        around, most, found = (self.teacher,) * steps, None, list[Way]()
        for _ in range(1 + refined):
            with self.progress.bar(f"Measuring what {steps} steps can leave out") as bar:
                swaps = bench.measure(around, choices, target.truth, bar)
            again = partial(self._solved, steps, solver, swaps, most)
            way = again(budget)
            if way is None or any(way.key == other.key for other in found):
                break
            found.append(way)
            self._again[role, way.key] = again
            assert isinstance(way.rule, Schedule)
            around, most = way.rule.actions, max(2, steps // MOST_CHANGES)
        return [(role, way) for way in found]

    def _solved(self, steps: int, solver: str | None, swaps: Swaps, most: int | None, budget: float) -> Way | None:
        solved = solve(swaps, self.times, budget, most)
        return None if solved is None else schedule_way(steps, solver, solved.actions, self.times.run(solved.actions))

    def calibrated(
        self,
        steps: int,
        solver: str | None,
        budget: float,
        member: Action,
        target: Target,
        role: str = "calibrated",
    ) -> list[tuple[str, Way]]:
        """One member alone with features inherited as `calibrate` finds it, for a loop of at most `budget` seconds.

        Its search knows every cut and unit and what errors do later on, where `joint` knows members; it is for the
        member's own full run. Of the schedules that it leads to, the nearest to the target; none where it has none for
        so little time.
        """
        full = self.times.run((member,) * steps)
        if not 0 < budget < full:
            return []  # for all of its steps in full, which are tried as such, or for none
        here = self.with_sampler(solver)
        assert member.member is not None
        here.register_modules(unet=self.members[member.member])
        settings = replace(
            self.settings, sampling=replace(self.settings.sampling, steps=steps), corrections=False, curve=0
        )
        known = self._kinds.get(member)
        choosing = prepare(here, settings, self.splits, self.one_batch, self.progress, known, target.judge)
        self._kinds[member] = choosing.every_times
        again = partial(self._calibrated, solver, choosing, full, member)
        way = again(budget)
        if way is None:
            return []
        self._again[role, way.key] = again
        return [(role, way)]

    def _calibrated(
        self, solver: str | None, choosing: Choosing, full: float, member: Action, budget: float
    ) -> Way | None:
        """A member's best for a loop of `budget` seconds, of which one that computes everything takes `full`."""
        try:
            plans = choosing.candidates(budget / full)
        except AsdmError as error:
            if error.exit_code != ExitCode.INFEASIBLE:
                raise
            return None
        steps, ways = choosing.times.steps, []
        for plan in plans:
            actions = tuple(a if a.skips else replace(a, member=member.member) for a in plan.actions(steps))
            seconds = plan.way.seconds / choosing.every_times.full_run * full
            ways.append(schedule_way(steps, solver, actions, seconds))
        with self.progress.bar("Trying what was calibrated") as bar:
            return choosing.judge.race(ways, progress=bar)[0]

    def tighter(
        self, ways: Sequence[tuple[str, Way]], shares: Sequence[float], share: float, outside: float
    ) -> list[tuple[str, Way]]:
        """Schedules from the same measurements as those that took slightly more than they may, for as much less.

        Shares are of a whole image, of which `outside` seconds are not of the loop.
        """
        found: dict[tuple[str, str], Way] = {}
        for (role, way), taken in zip(ways, shares, strict=True):
            again = self._again.get((role, way.key))
            if again is None or not share < taken <= share * SLIGHTLY:
                continue
            another = again(0.99 * share / taken * (way.seconds + outside) - outside)
            if another is not None and another.key != way.key:
                found[role, another.key] = another
                self._again[role, another.key] = again
        return [(role, way) for (role, _), way in found.items()]
