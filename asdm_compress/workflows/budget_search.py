"""What `optimize` tries for a time: the reference, what it is compared on, and the candidates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.store import measurement_folder
from asdm_compress.core.errors import AsdmError
from asdm_compress.evaluation.instruments import Instruments, Weights
from asdm_compress.inheritance.actions import Action, conditional_only, cut
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.places import find_places
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.validity import Validity, mark_of, solver_of
from asdm_compress.profiling.latency import median_ratio, time_side_by_side
from asdm_compress.sampling.images import decode
from asdm_compress.sampling.settings import encode, initial_latents, latent_side
from asdm_compress.scenes.world import IMAGE_SIZE
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.rollouts import Judge
from asdm_compress.scheduling.switch_times import SKIP, time_options
from asdm_compress.scheduling.timing import time_runs
from asdm_compress.scheduling.ways import SOLVERS, Way
from asdm_compress.scheduling.worth import QualityJudge, Worth, best_of
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.calibrate import TEST_SEED, VALIDATION_SEED, CalibrateSettings, split_prompts, timed_batch
from asdm_compress.workflows.candidates import Candidate, Criterion, tried_steps
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.schedule_search import ScheduleSearch, Target

LONGER: Final = (1.0, 1.4, 2.0)
CUTS: Final = (0, 2)  # that a step may leave out what is inside of, where the UNet has them
TIGHTER: Final = 3  # times at most
# Where quality counts: full runs of so many times the steps that the time has are tried, and schedules that come near
# to the one of fewest steps whose pictures are as good as the reference's, and to the next ones.
FEWER: Final = (1.3, 1.6, 2.0, 2.5, 3.2, 4.0)
TARGETS: Final = 3
FEWEST, FEW = 2, 32  # pictures: those without have no distance to others, and up to there they say little
NEAR_PROMPTS: Final = 16  # on which nearness is judged then: it takes fewer than quality


def open_instruments(
    pipeline: StableDiffusionPipeline, settings: CalibrateSettings, criterion: Criterion, progress: Progress
) -> Instruments | None:
    """What judges pictures where quality is the criterion; raises AsdmError where nothing can judge these."""
    if not criterion.is_quality:
        return None
    splits = split_prompts(pipeline, settings)
    side = latent_side(pipeline, settings.sampling) * pipeline.vae_scale_factor
    if criterion.clip is None and not (splits.captions and side == IMAGE_SIZE):
        raise AsdmError(
            "nothing here can judge the quality of these pictures",
            "Name the folder of a CLIP model with --clip; only the bundled world's own captions need none, in "
            f"{IMAGE_SIZE} pixels.",
        )
    count = min(len(splits.validation), len(splits.test))
    if count < FEWEST:
        raise AsdmError(
            f"the quality of fewer than {FEWEST} pictures cannot be judged",
            "Give more prompts, or more of them for --validation-prompts and --test-prompts.",
        )
    if count < FEW:
        progress.note(f"quality is judged on {count} pictures, which say little: {FEW} and more are better")
    clip = criterion.clip
    return Instruments(Weights(clip=clip, cmmd=clip), reads_scenes=clip is None, device=pipeline.device)


class Search:
    """The reference, what it is compared on, and the candidates; with `instruments` quality is the criterion."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        members: Mapping[str, UNet2DConditionModel],
        settings: CalibrateSettings,
        progress: Progress,
        instruments: Instruments | None = None,
    ) -> None:
        self.pipeline, self.members, self.settings, self.progress = pipeline, members, settings, progress
        self.by_quality, self._instruments = instruments is not None, instruments
        self.sampler, self.splits = type(pipeline.scheduler).__name__, split_prompts(pipeline, settings)
        self.teacher, *self.students = (Action(member=name) for name in members)
        steps = settings.sampling.steps
        self.unet = self._switched((self.teacher,) * steps, pipeline)
        pipeline.unet = self.unet
        self.one_batch = timed_batch(pipeline, self.splits, settings)
        self._solvers: dict[int, str | None] = {}  # the best sampler for a number of steps
        self._judges: dict[tuple[str, ...], QualityJudge] = {}  # by the prompts
        with progress.stage("Timing"):
            # Students' own cuts are left out: they save little of what is little, and there would be half as many
            # exchanges more to measure.
            choices = (self.teacher, *self.students, *self._light(self.teacher), SKIP)
            choices += tuple(a for student in self.students for a in self._light(student) if not a.inherits)
            self.times = time_options(pipeline, choices, self.one_batch, settings.sampling, settings.repeats)
            self.encoding, self.decoding = self._outside()
            self.outside = self.encoding + self.decoding
        self.whole = self.outside + self.times.full(steps)
        self.schedules = ScheduleSearch(pipeline, members, settings, self.splits, self.one_batch, self.times, progress)
        near = self.splits.validation[: NEAR_PROMPTS if self.by_quality else None]
        self.reference = self.schedules.target(steps, None, near)
        # Nearness to the reference on all validation prompts, which its own judge has where nothing else counts.
        self.judge = self.quality.judge if self.by_quality else self.reference.judge

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

        `longer` are the steps of the schedules that are to come near to the reference, as in `tried_steps`.
        """
        budget = share * self.whole - self.outside
        if share < self.least:
            return []
        ways = self._fewer(budget)
        if self.by_quality:
            return ways + [way for target in self.targets(budget) for way in self._near(target, budget)]
        reference, most = self.settings.sampling.steps, max((way.steps for _, way in ways), default=1)
        for member in (self.teacher, *self.students):
            own = self._full_steps(member, budget)
            for steps in tried_steps(max(own, 1), most, reference, longer):
                solver = self._solver(steps)
                if member == self.teacher:
                    ways += self.schedules.joint(steps, solver, budget, self.reference)
                if own < steps < reference:
                    ways += self.schedules.calibrated(steps, solver, budget, member, self.reference)
            # What `calibrate` does: of the reference's own steps as many, on which only the member and what is
            # inherited err.
            ways += self.schedules.calibrated(reference, None, budget, member, self.reference)
        return ways

    def _near(self, target: Target, budget: float) -> list[tuple[str, Way]]:
        """What comes near to a target in its own steps."""
        steps, solver = target.steps, target.solver
        ways = self.schedules.joint(steps, solver, budget, target)
        for member in (self.teacher, *self.students):
            ways += self.schedules.calibrated(steps, solver, budget, member, target)
        return ways

    def targets(self, budget: float) -> list[Target]:
        """Full runs of the teacher's in few steps, of the sampler that needs the fewest for pictures as good.

        As good as the reference's, that is. Where no other is, the best of those of the most steps.
        """
        reference, own = self.settings.sampling.steps, max(1, self._full_steps(self.teacher, budget))
        counts = sorted({max(2, round(own * more)) for more in FEWER if round(own * more) < reference})
        if not counts:
            return [self.reference]
        fewest = {solver: self._fewest(counts, solver) for solver in SOLVERS}
        least = min(fewest.values())
        tied = [solver for solver in SOLVERS if fewest[solver] == least]
        first = min(least, len(counts) - 1)
        solver = tied[best_of([self.worth(self.schedules.full_run(counts[first], solver)) for solver in tied])]
        near = self.splits.validation[:NEAR_PROMPTS]
        return [self.schedules.target(count, solver, near) for count in counts[first:][:TARGETS]]

    def _fewest(self, counts: Sequence[int], solver: str) -> int:
        """The place of the fewest steps with which a sampler is as good as the reference; behind the last for none."""
        low, high = 0, len(counts)
        while low < high:  # more steps are taken to be no worse
            middle = (low + high) // 2
            if self.worth(self.schedules.full_run(counts[middle], solver)).is_as_good_as(self.quality.full):
                high = middle
            else:
                low = middle + 1
        return low

    def worth(self, way: Way) -> Worth:
        """What a way's pictures of the validation prompts are worth."""
        with self.progress.stage(f"Judging {way.name}"):
            return self.quality.worth(way)

    @cached_property
    def quality(self) -> QualityJudge:
        """Judges pictures of the validation prompts."""
        return self.quality_on(self.splits.validation)

    def quality_on(self, prompts: tuple[str, ...]) -> QualityJudge:
        """Judges pictures of some of the validation prompts; made once."""
        if prompts not in self._judges:
            self._judges[prompts] = self._quality(self._judge(prompts, VALIDATION_SEED))
        return self._judges[prompts]

    @cached_property
    def tested_quality(self) -> QualityJudge:
        """Judges pictures of the test prompts."""
        return self._quality(self._judge(self.splits.test, TEST_SEED))

    def _quality(self, judge: Judge) -> QualityJudge:
        assert self._instruments is not None
        known = self.splits.captions
        captions = [known[prompt] for prompt in judge.prompts] if self._instruments.reader is not None else None
        with self.progress.stage("Judging the full run"):
            return QualityJudge(judge, self._instruments, captions)

    def tried(self, share: float) -> list[Candidate]:
        """The same with measured times and scores, and what is found for less where a schedule takes too much.

        Where quality is the criterion, what keeps the time is judged by it too.
        """
        ways = self.ways(share)
        if not ways:
            return []
        with self.progress.stage("Timing whole runs in turns"):
            shares = self.shares([way for _, way in ways])
        latest, taken = ways, shares
        for _ in range(TIGHTER):
            latest = self.schedules.tighter(latest, taken, share, self.outside)
            latest = [(role, way) for role, way in latest if (role, way.key) not in {(r, w.key) for r, w in ways}]
            if not latest:
                break
            with self.progress.stage("Timing whole runs in turns"):
                taken = self.shares([way for _, way in latest])
            ways, shares = ways + latest, shares + taken
        worths: list[Worth | None] = [None] * len(ways)
        if self.by_quality:
            within = [number for number, taken_share in enumerate(shares) if taken_share <= share]
            with self.progress.bar("Judging pictures of validation prompts") as bar:
                for number, worth in zip(within, self.quality.worths([ways[n][1] for n in within], bar), strict=True):
                    worths[number] = worth
        with self.progress.bar("Scoring on validation prompts") as bar:
            scores = self.judge.scores([way for _, way in ways], bar)
        rows = zip(ways, shares, scores, worths, strict=True)
        return [Candidate(*way, taken_share, score, worth=worth) for way, taken_share, score, worth in rows]

    def tested(self, tried: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with their scores on test prompts, and what their pictures of these are worth."""
        worths: list[Worth | None] = [None] * len(tried)
        judge = self.tested_quality.judge if self.by_quality else self._judge(self.splits.test, TEST_SEED)
        with self.progress.bar("Reporting on test prompts") as bar:
            if self.by_quality:
                judged = [number for number, candidate in enumerate(tried) if candidate.worth is not None]
                found = self.tested_quality.worths([tried[number].way for number in judged], bar)
                for number, worth in zip(judged, found, strict=True):
                    worths[number] = worth
            scores = judge.scores([c.way for c in tried], bar)
        rows = zip(tried, scores, worths, strict=True)
        return [replace(c, test=score, test_worth=worth) for c, score, worth in rows]

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
            ways = [self.schedules.full_run(steps, solver) for solver in SOLVERS]
            with self.progress.bar(f"Trying samplers with {steps} steps") as bar:
                self._solvers[steps] = self.judge.race(ways, progress=bar)[0].scheduler
        return self._solvers[steps]

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
        pipeline = self.schedules.with_sampler(way.scheduler)
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
            "the one in its folder", mark_of(pipeline.unet), type(pipeline.scheduler).__name__, len(timeline),
            timeline.sigmas or (), max(sampling.guidance, 1.0), (int(size[2]), int(size[3])),
            solver_of(pipeline.scheduler),
        )  # fmt: skip
        return pipeline, Schedule(actions, {}, validity)
