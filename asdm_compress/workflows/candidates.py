"""What `optimize` tries for a time: the reference, what it is compared on, and the candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.store import measurement_folder
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.inheritance.actions import Action, conditional_only, cut
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.places import find_places
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.validity import Validity, mark_of, solver_of
from asdm_compress.profiling.latency import median_ratio, time_side_by_side
from asdm_compress.sampling.images import decode
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import encode, initial_latents
from asdm_compress.scheduling.goals import Choosing
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.rollouts import Judge, Score
from asdm_compress.scheduling.swaps import Bench, Swaps, Values
from asdm_compress.scheduling.switch_search import solve
from asdm_compress.scheduling.switch_times import SKIP, StepTimes, time_options
from asdm_compress.scheduling.timing import KindTimes, time_runs
from asdm_compress.scheduling.ways import SOLVERS, Way
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.calibrate import (
    TEST_SEED,
    VALIDATION_SEED,
    CalibrateSettings,
    prepare,
    split_prompts,
    timed_batch,
)
from asdm_compress.workflows.progress import Progress

REFINED: Final = 1  # times that a schedule is measured around again
LONGER: Final = (1.0, 1.4, 2.0)
CHEAP: Final = 8  # steps, that are soon measured
MOST_CHANGES: Final = 3  # in one refinement, one step in so many
CUTS: Final = (0, 2)  # that a step may leave out what is inside of, where the UNet has them
SLIGHTLY: Final = 1.2  # times the budget: schedules that take no more are solved again for less
TIGHTER: Final = 3  # times at most
Again = Callable[[float], Way | None]  # the way for a loop of other seconds, from the same measurements


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way of sampling, its time for a whole image over the reference's, and its scores against the reference."""

    role: str
    way: Way
    share: float
    validation: Score
    test: Score | None = None

    def as_json(self) -> dict[str, Any]:
        """For files."""
        rule = self.way.rule
        return {
            "role": self.role, "way": self.way.name, "steps": self.way.steps, "scheduler": self.way.scheduler,
            "share": self.share, "validation": self.validation.as_json(),
            "test": self.test.as_json() if self.test else None,
            "actions": [action.name for action in rule.actions] if isinstance(rule, Schedule) else None,
        }  # fmt: skip


def _spent(actions: Sequence[Action]) -> str:
    """What a schedule's steps do, counted, for people: two of them are told apart by it."""
    counts = Counter(
        "skipped" if action.skips else f"{action.member}{'' if action.is_whole else ' in part'}" for action in actions
    )
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def _way(steps: int, solver: str | None, actions: tuple[Action, ...], seconds: float) -> Way:
    """A schedule, named by what it does."""
    return Way(
        f"{steps} steps of {solver or 'its own sampler'}, {_spent(actions)}", steps, seconds, Schedule(actions), solver
    )


def frontier_of(tried: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates that none which takes less time is as good as, on validation prompts; test ones choose nothing."""
    found: list[Candidate] = []
    for candidate in sorted(tried, key=lambda c: c.share):
        if not found or candidate.validation.mean() > found[-1].validation.mean():
            found.append(candidate)
    return tuple(found)


def tried_steps(full: int, fastest: int, reference: int, longer: Sequence[float]) -> list[int]:
    """How many steps schedules are tried with that run a member, or several.

    `longer` times those that it, of several the teacher, computes in `full` in the time, at most the reference's; where
    it has time for next to none, times a few of those that the `fastest` member computes.
    """
    most = max(full, min(fastest, CHEAP))
    return list(dict.fromkeys(min(reference, max(2, round(factor * most))) for factor in longer))


class Search:
    """The reference, what it is compared on, and the candidates."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        members: Mapping[str, UNet2DConditionModel],
        settings: CalibrateSettings,
        progress: Progress,
    ) -> None:
        self.pipeline, self.members, self.settings, self.progress = pipeline, members, settings, progress
        self.sampler = type(pipeline.scheduler).__name__
        self.teacher, *self.students = (Action(member=name) for name in members)
        steps = settings.sampling.steps
        self.unet = self._switched((self.teacher,) * steps, pipeline)
        pipeline.unet = self.unet
        self.splits = split_prompts(pipeline, settings)
        self.one_batch = timed_batch(pipeline, self.splits, settings)
        self._again: dict[tuple[str, str], Again] = {}  # by role and key of a way
        self._solvers: dict[int, str | None] = {}  # the best sampler for a number of steps
        self._kinds: dict[tuple[Action, str | None], KindTimes] = {}  # by member and sampler, for all numbers of steps
        with progress.stage("Timing"):
            # Students' own cuts are left out: they save little of what is little, and there would be half as many
            # exchanges more to measure.
            choices = (self.teacher, *self.students, *self._light(self.teacher), SKIP)
            choices += tuple(a for student in self.students for a in self._light(student) if not a.inherits)
            self.times: StepTimes = time_options(pipeline, choices, self.one_batch, settings.sampling, settings.repeats)
            self.encoding, self.decoding = self._outside()
            self.outside = self.encoding + self.decoding
        self.whole = self.outside + self.times.full(steps)
        with progress.stage("Sampling the reference"):
            self.judge = self._judge(self.splits.validation, VALIDATION_SEED)

    def _light(self, member: Action) -> tuple[Action, ...]:
        """What a step of a member may leave out: layers inside of a cut, the unconditional branch, or both."""
        assert member.member is not None
        places = find_places(self.members[member.member])
        branches = [branch for branch in CUTS if f"cut.{branch}" in places]
        cuts = [Action(cut(branch, LINEAR).inherits, None, member.member) for branch in branches]
        if self.settings.sampling.guidance <= 1:
            return tuple(cuts)
        return (*cuts, *(replace(conditional_only(LINEAR, a), member=member.member) for a in (member, *cuts)))

    def ways(self, share: float, longer: Sequence[float] = LONGER) -> list[tuple[str, Way]]:
        """Everything that is to be tried for a share of the time, and what a user would do instead.

        `longer` are the steps of the tried schedules, as in `tried_steps`.
        """
        budget = share * self.whole - self.outside
        if share < self.least:
            return []
        ways = self._fewer(budget)
        reference, most = self.settings.sampling.steps, max((way.steps for _, way in ways), default=1)
        for member in (self.teacher, *self.students):
            own = self._full_steps(member, budget)
            for steps in tried_steps(max(own, 1), most, reference, longer):
                if member == self.teacher:
                    ways += self.joint(steps, self._solver(steps), budget)
                if own < steps < reference:
                    ways += self.calibrated(steps, self._solver(steps), budget, member)
            # What `calibrate` does: of the reference's own steps as many, on which only the member and what is
            # inherited err.
            ways += self.calibrated(reference, None, budget, member)
        return ways

    def tried(self, share: float) -> list[Candidate]:
        """The same with measured times and scores, and what is found for less where a schedule takes too much."""
        ways = self.ways(share)
        if not ways:
            return []
        with self.progress.stage("Timing whole runs in turns"):
            shares = self.shares([way for _, way in ways])
        latest, taken = ways, shares
        for _ in range(TIGHTER):
            latest = self.tighter(latest, taken, share)
            latest = [(role, way) for role, way in latest if (role, way.key) not in {(r, w.key) for r, w in ways}]
            if not latest:
                break
            with self.progress.stage("Timing whole runs in turns"):
                taken = self.shares([way for _, way in latest])
            ways, shares = ways + latest, shares + taken
        with self.progress.bar("Scoring on validation prompts") as bar:
            scores = self.judge.scores([way for _, way in ways], bar)
        return [Candidate(*w, s, score) for w, s, score in zip(ways, shares, scores, strict=True)]

    def tighter(self, ways: Sequence[tuple[str, Way]], shares: Sequence[float], share: float) -> list[tuple[str, Way]]:
        """Schedules from the same measurements as those that took slightly more than they may, for as much less."""
        found: dict[tuple[str, str], Way] = {}
        for (role, way), taken in zip(ways, shares, strict=True):
            again = self._again.get((role, way.key))
            if again is None or not share < taken <= share * SLIGHTLY:
                continue
            another = again(0.99 * share / taken * (way.seconds + self.outside) - self.outside)
            if another is not None and another.key != way.key:
                found[role, another.key] = another
                self._again[role, another.key] = again
        return [(role, way) for (role, _), way in found.items()]

    def tested(self, tried: Sequence[Candidate], bar: Any) -> list[Candidate]:
        """The candidates with their scores on test prompts."""
        judge = self._judge(self.splits.test, TEST_SEED)
        scores = judge.scores([c.way for c in tried], bar)
        return [replace(c, test=score) for c, score in zip(tried, scores, strict=True)]

    def _fewer(self, budget: float) -> list[tuple[str, Way]]:
        """As many full steps of each sampler, of the teacher and of each student alone, as the time allows."""
        found = []
        for member in (self.teacher, *self.students):
            count = self._full_steps(member, budget)
            for solver in SOLVERS if count > 1 else ():
                name = f"{count} steps of {solver}" + ("" if member == self.teacher else f", {member.member} alone")
                actions = (member,) * count
                role = "fewer steps" if member == self.teacher else "a student alone"
                found.append((role, Way(name, count, self.times.run(actions), Schedule(actions), solver)))
        return found

    @property
    def least(self) -> float:
        """The share of the time that the shortest of all schedules takes: a step of the fastest member, and none."""
        fastest = min((self.teacher, *self.students), key=lambda member: self.times.seconds[member])
        return (self.outside + self.times.run((fastest, SKIP))) / self.whole

    def _full_steps(self, member: Action, budget: float) -> int:
        """How many steps a member computes in full in a loop of `budget` seconds, at most the reference's."""
        count = int((budget - self.times.outside) / self.times.seconds[member])
        return max(0, min(count, self.settings.sampling.steps))

    def _solver(self, steps: int) -> str | None:
        """The sampler whose full run of so many steps is the nearest to the reference; None is the reference's own.

        Which one is, depends on their number: of few it need not be the one that is near with many.
        """
        if steps == self.settings.sampling.steps:
            return None
        if steps not in self._solvers:
            rule = Schedule((self.teacher,) * steps)
            seconds = self.times.full(steps)
            ways = [Way(f"{steps} steps of {solver}", steps, seconds, rule, solver) for solver in SOLVERS]
            with self.progress.bar(f"Trying samplers with {steps} steps") as bar:
                self._solvers[steps] = self.judge.race(ways, progress=bar)[0].scheduler
        return self._solvers[steps]

    def joint(
        self,
        steps: int,
        solver: str | None,
        budget: float,
        choices: Sequence[Action] | None = None,
        role: str = "joint",
        refined: int = REFINED,
    ) -> list[tuple[str, Way]]:
        """Schedules of one number of steps in which members, inheritance and guidance are chosen together.

        The loop of a run takes at most `budget` seconds. `choices` are some of what a step may do, the first the
        teacher's whole step; all of it by default. A schedule is measured around `refined` times.
        """
        here = self._pipeline(solver)
        sampling = replace(self.settings.sampling, steps=steps)
        timeline = sampler_timeline(here, steps)
        folder = measurement_folder(here, self.splits.calibration, sampling, 0)
        choices = tuple(self.times.seconds) if choices is None else tuple(choices)
        bench = Bench(here, timeline, self.splits.calibration, sampling, folder, self.settings.batch)
        truth = self._truth
        around, most, found = (self.teacher,) * steps, None, list[Way]()
        for _ in range(1 + refined):
            with self.progress.bar(f"Measuring what {steps} steps can leave out") as bar:
                swaps = bench.measure(around, choices, truth, bar)
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
        return None if solved is None else _way(steps, solver, solved.actions, self.times.run(solved.actions))

    def calibrated(
        self, steps: int, solver: str | None, budget: float, member: Action, role: str = "calibrated"
    ) -> list[tuple[str, Way]]:
        """One member alone with features inherited as `calibrate` finds it, for a loop of at most `budget` seconds.

        Its search knows every cut and unit and what errors do later on, where `joint` knows members; it is for the
        member's own full run. Of the schedules that it leads to, the nearest to the reference; none where it has none
        for so little time.
        """
        full = self.times.run((member,) * steps)
        if not 0 < budget < full:
            return []  # for all of its steps in full, which are tried as such, or for none
        here = self._pipeline(solver)
        assert member.member is not None
        here.register_modules(unet=self.members[member.member])
        settings = replace(
            self.settings, sampling=replace(self.settings.sampling, steps=steps), corrections=False, curve=0
        )
        known = self._kinds.get((member, solver))
        choosing = prepare(here, settings, self.splits, self.one_batch, self.progress, known, self.judge)
        self._kinds[member, solver] = choosing.every_times
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
            ways.append(_way(steps, solver, actions, plan.way.seconds / choosing.every_times.full_run * full))
        with self.progress.bar("Trying what was calibrated") as bar:
            return self.judge.race(ways, progress=bar)[0]

    @cached_property
    def _truth(self) -> Values:
        """The reference's final latents on the calibration prompts."""
        sampling = self.settings.sampling
        timeline = sampler_timeline(self.pipeline, sampling.steps)
        bench = Bench(self.pipeline, timeline, self.splits.calibration, sampling, None, self.settings.batch)
        return bench.final_latents((self.teacher,) * sampling.steps)

    def shares(self, ways: Sequence[Way]) -> list[float]:
        """Time of a whole image, what is outside of the loop included, over the reference's; taken in turns."""
        sampling = self.settings.sampling
        loops = [way.loop(self.pipeline, self.one_batch, sampling) for way in (Way("full", sampling.steps, 0), *ways)]
        full, *others = time_runs(loops, self.settings.repeats)
        base = [seconds + self.outside for seconds in full]
        return [median_ratio([seconds + self.outside for seconds in some], base) for some in others]

    @torch.no_grad()
    def _outside(self) -> tuple[float, float]:
        """Seconds of the text encoder and of the VAE's decoder for one batch."""
        images = self.settings.images
        prompts = list(self.splits.test[:1]) * images
        latents = initial_latents(self.pipeline, images, self.settings.sampling)

        def encoding() -> None:
            encode(self.pipeline, prompts, self.settings.sampling.guidance)

        def decoding() -> None:
            decode(self.pipeline, latents, images)

        # On the clock of the runs that this is added to.
        passes = [encoding, decoding]
        before, after = time_side_by_side(passes, self.settings.repeats, self.pipeline.device, undisturbed=True)
        return median(before), median(after)

    def _judge(self, prompts: Sequence[str], seed: int) -> Judge:
        here = replace(self.settings.sampling, seed=seed)
        folder = measurement_folder(self.pipeline, prompts, here, 0)
        return Judge(self.pipeline, prompts, here, folder, self.settings.batch)

    def _pipeline(self, solver: str | None) -> StableDiffusionPipeline:
        parts = dict(self.pipeline.components)
        if solver:
            parts["scheduler"] = make_scheduler(solver, self.pipeline)
        checked = self.pipeline.config.get("requires_safety_checker", False)
        return type(self.pipeline)(**parts, requires_safety_checker=checked)

    def _switched(
        self, actions: tuple[Action, ...], pipeline: StableDiffusionPipeline, names: Collection[str] | None = None
    ) -> SwitchedUNet2DConditionModel:
        """The members of these names, by default all, as one UNet that does these actions."""
        timeline = sampler_timeline(pipeline, len(actions))
        schedule = SwitchingSchedule(actions, timeline.timesteps, noise_of(pipeline.scheduler))
        members = {name: unet for name, unet in self.members.items() if names is None or name in names}
        return SwitchedUNet2DConditionModel.of(members, schedule)  # type: ignore[no-any-return]

    def used(self, candidates: Sequence[Candidate]) -> frozenset[str]:
        """The members that the steps of any of these run; none where all are the teacher's, as it is by itself."""
        actions = {a for c in candidates if isinstance(c.way.rule, Schedule) for a in c.way.rule.actions}
        if actions == {self.teacher}:
            return frozenset()
        return frozenset(action.member for action in actions if action.member is not None)

    def ready(self, candidate: Candidate, names: Collection[str]) -> tuple[StableDiffusionPipeline, Schedule | None]:
        """A pipeline that samples as a candidate does, with the members of these names, and the schedule to inherit by.

        Without any, which is for the teacher's steps alone, it has the teacher's UNet, and there is no schedule.
        """
        way = candidate.way
        pipeline = self._pipeline(way.scheduler)
        assert isinstance(way.rule, Schedule)
        actions = way.rule.actions
        if not names:
            pipeline.register_modules(unet=next(iter(self.members.values())))
            return pipeline, None
        pipeline.register_modules(unet=self._switched(actions, pipeline, names))
        sampling = self.settings.sampling
        timeline = sampler_timeline(pipeline, way.steps)
        size = initial_latents(pipeline, 1, sampling).shape
        validity = Validity(
            "this folder", mark_of(pipeline.unet), type(pipeline.scheduler).__name__, len(timeline),
            timeline.sigmas or (), max(sampling.guidance, 1.0), (int(size[2]), int(size[3])),
            solver_of(pipeline.scheduler),
        )  # fmt: skip
        return pipeline, Schedule(actions, {}, validity)
