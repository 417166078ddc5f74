"""`calibrate`: from a model and a time budget to a schedule of feature inheritance, tried against its rivals."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.assembly.in_time import TIMING_TOLERANCE
from asdm_compress.assembly.store import measurement_folder
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.files import check_output, output_folder
from asdm_compress.core.units import parse_budget
from asdm_compress.evaluation.prompts import choose_prompts
from asdm_compress.inheritance.members import HasMembers
from asdm_compress.inheritance.modes import Mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import save_schedule
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.inheritance.validity import Validity, mark_of, solver_of
from asdm_compress.models.families import check_supported
from asdm_compress.models.loading import open_pipeline
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.latency import median_ratio
from asdm_compress.reporting.calibration import Point, steps_svg, time_psnr_svg
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import (
    SamplingSettings,
    check_not_offloaded,
    check_size,
    check_text_to_image,
    encode,
    initial_latents,
)
from asdm_compress.scheduling.check_steps import check_steps
from asdm_compress.scheduling.fits import Fitter
from asdm_compress.scheduling.goals import Choosing, Goal, Plan, choose_schedule, goal_of
from asdm_compress.scheduling.measure import find_menus, measure_surrogate, sampler_timeline
from asdm_compress.scheduling.menu import kind_of
from asdm_compress.scheduling.rollouts import Judge
from asdm_compress.scheduling.search import DynamicProgram, find_front
from asdm_compress.scheduling.timing import REPEATS, KindTimes, time_kinds, time_runs
from asdm_compress.scheduling.ways import SOLVERS, Way, cheapest_cache, fewer_steps, uniform_caches
from asdm_compress.workflows.calibrated import Calibrated, Contestant, Splits, own_splits, schedule_of, verdict_on
from asdm_compress.workflows.card import PYTHON
from asdm_compress.workflows.progress import Progress, Silent

VALIDATION_SEED: Final = 20_000  # of the first picture; calibration's is the user's
TEST_SEED: Final = 30_000
GRID_COLUMNS: Final = 6
SHOWN: Final = ("schedule", "DeepCache", "fewer steps, best sampler")  # in the grid
MOST_ROUNDS: Final = 6  # of searching for less, where a schedule takes more time than predicted


@dataclass(frozen=True, slots=True)
class CalibrateSettings:
    """Everything that changes a schedule besides the model; `images` are sampled at once where runs are timed.

    Without `corrections` none are fitted. `curve` is the number of other times that are tried for the plot.
    """

    goal: Goal
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    scheduler: str | None = None
    prompts: tuple[str, ...] | None = None
    calibration_prompts: int = 16
    validation_prompts: int = 32
    test_prompts: int = 32
    images: int = 1
    batch: int = 8
    repeats: int = REPEATS
    corrections: bool = True
    curve: int = 3
    command: str = PYTHON


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """What `calibrate` found; the files in `out` hold the same."""

    out: Path
    calibrated: Calibrated
    content: Mapping[str, Any]


def run_calibrate(
    model: str,
    out: Path,
    options: LoadOptions,
    settings: CalibrateSettings,
    progress: Progress,
    overwrite: bool = False,
) -> CalibrateResult:
    """Calibrate a schedule and write `inheritance.yaml` and its report to `out`.

    Measurements are kept on disk by content, so that a run that was cut off goes on where it was. Raises AsdmError for
    bad input (exit code 2) and a goal that no schedule meets (3). `out` appears whole or not at all.
    """
    check_output(out, overwrite)
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        pipeline = open_pipeline(source, options)
        check_output(out, overwrite, source.path)
    for note in source.notes:
        progress.note(note)
    if settings.scheduler:
        pipeline.scheduler = make_scheduler(settings.scheduler, pipeline)
    calibrated = find_schedule(pipeline, settings, progress)
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        content = write_schedule(aside, model, calibrated, settings)
    return CalibrateResult(out, calibrated, content)


def calibrate(pipeline: StableDiffusionPipeline, budget: str, settings: CalibrateSettings | None = None) -> Schedule:
    """The schedule for a pipeline as it is, its sampler too, within a budget such as `latency=0.5x`.

    For `inheriting(pipeline, …)` and `save_schedule`. `settings` are for another sampler's steps and guidance than the
    usual ones, and for prompts; their goal is not looked at.
    """
    goal = goal_of(parse_budget([budget]), None, None)
    # Without the curve, which only the report shows.
    settings = replace(CalibrateSettings(goal) if settings is None else settings, goal=goal, curve=0)
    if settings.scheduler is not None:
        raise AsdmError(
            "a schedule is calibrated for the pipeline's own sampler, whatever the settings name",
            "Give the pipeline that sampler first: pipeline.scheduler = …",
        )
    found, sampling = find_schedule(pipeline, settings, Silent()), settings.sampling
    validity = _validity("the one that was calibrated", pipeline, found.choosing.surrogate.timeline, sampling)
    return replace(found.schedule(sampling.steps), validity=validity)


def write_schedule(folder: Path, model: str, calibrated: Calibrated, settings: CalibrateSettings) -> Mapping[str, Any]:
    """`inheritance.yaml` with its corrections, and its report: figures, the picture of its steps, plot and grid.

    What `calibration.json` holds.
    """
    sampling, pipeline = settings.sampling, calibrated.choosing.judge.pipeline
    content = {
        "model": model,
        "command": settings.command,
        **calibrated.as_json(settings.goal, sampling, settings.images),
    }
    schedule = calibrated.schedule(sampling.steps)
    validity = _validity(model, pipeline, calibrated.choosing.surrogate.timeline, sampling)
    save_schedule(replace(schedule, validity=validity), folder / "inheritance.yaml")
    (folder / "calibration.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "steps.svg").write_text(steps_svg(pipeline.unet, schedule.actions, calibrated.steps), encoding="utf-8")
    (folder / "time_psnr.svg").write_text(time_psnr_svg(calibrated.points()), encoding="utf-8")
    calibrated.grid().save(folder / "inheritance.png")
    return content


def find_schedule(pipeline: StableDiffusionPipeline, settings: CalibrateSettings, progress: Progress) -> Calibrated:
    """The schedule for a goal, and its rivals in the same time; see `run_calibrate`."""
    if isinstance(pipeline.unet, HasMembers):
        # What is measured of steps is one UNet's: the body would be taken for all of its members.
        raise AsdmError(
            "this UNet is switched between members, and a schedule of inheritance is calibrated for one",
            "Calibrate a member by itself, or give all of them to `asdm-compress optimize --members`.",
        )
    check_supported(pipeline.unet)
    check_text_to_image(pipeline)
    if "image" in inspect.signature(type(pipeline).__call__).parameters:
        raise AsdmError(
            f"{type(pipeline).__name__} asks for an image, and schedules are measured from text alone",
            "Calibrate a StableDiffusionPipeline of the same parts; its schedule is for this one too.",
        )
    if getattr(pipeline.unet, "encoder_hid_proj", None) is not None:
        raise AsdmError(
            "an IP-Adapter is loaded, which asks for an image, and schedules are measured from text alone",
            "Call unload_ip_adapter() first; the schedule is taken with the adapter, too.",
        )
    check_size(pipeline, settings.sampling)
    check_not_offloaded(pipeline)
    sampling = settings.sampling
    splits = split_prompts(pipeline, settings)
    if settings.goal.limit is None and len(splits.validation) < 2:
        raise AsdmError(
            "one prompt to choose on vouches for no mean quality",
            "Choose on two or more: give --prompts at least four lines, or --validation-prompts 2 or more.",
        )
    one_batch = timed_batch(pipeline, splits, settings)
    choosing = prepare(pipeline, settings, splits, one_batch, progress)
    share = settings.goal.share(choosing.times.full_run)
    with progress.stage("Trying schedules on validation prompts"):
        plan, taken = _within(share, choosing, settings, one_batch)
    with progress.bar("Trying what could be done instead, in the same time") as bar:
        ways = [("schedule", plan.way), *_rivals(choosing, taken, bar)]
    with progress.stage("Timing them in turns"):
        shares = measured_shares([way for _, way in ways], pipeline, settings, one_batch)
    curve: tuple[Point, ...] = ()
    if settings.curve:
        with progress.bar("Trying other times for the plot") as bar:
            curve = tuple(_curve(choosing, ways[1:], settings.curve, bar))
    with progress.bar("Reporting on test prompts") as bar:
        last = replace(sampling, seed=TEST_SEED)
        folder = measurement_folder(pipeline, splits.test, last, 0)
        tests = Judge(pipeline, splits.test, last, folder, settings.batch)
        scores = tests.scores([way for _, way in ways], bar)
    judge = choosing.judge
    shown = len(tests.pictures[:GRID_COLUMNS])
    contestants = tuple(
        Contestant(
            role, way, measured, judge.score(way), found, tuple(tests.pictures_of(way, shown)) if role in SHOWN else ()
        )
        for (role, way), measured, found in zip(ways, shares, scores, strict=True)
    )
    with progress.stage("Checking the predictions step by step"):
        schedule = schedule_of(plan, sampling.steps)
        steps = check_steps(
            pipeline, choosing.surrogate, schedule, choosing.step_seconds(schedule.actions),
            judge.texts[: settings.batch], judge.settings, one_batch, plan.fit.left if plan.fit else None,
        )  # fmt: skip
    return Calibrated(
        choosing, splits, plan, contestants, steps, verdict_on(contestants), curve, tuple(tests.pictures[:shown])
    )


def prepare(
    pipeline: StableDiffusionPipeline,
    settings: CalibrateSettings,
    splits: Splits,
    one_batch: Tensor,
    progress: Progress,
    known: KindTimes | None = None,
    judge: Judge | None = None,
) -> Choosing:
    """Everything that is measured before anything is chosen. Kinds of steps that are `known` are not timed again.

    They may be another sampler's: its own work is the same at every kind, and little beside the UNet's. Without a
    `judge` schedules are compared with the pipeline's own full run on the validation prompts.
    """
    sampling = settings.sampling
    timeline = sampler_timeline(pipeline, sampling.steps)
    menus = find_menus(pipeline, sampling, timeline)
    folder = measurement_folder(pipeline, splits.calibration, sampling, 0)
    if known is not None and known.lights == menus.every.lights and set(menus.kinds) <= set(known.seconds):
        every_times = replace(known, steps=sampling.steps)
    else:
        with progress.stage("Timing every kind of step"):
            every_times = time_kinds(
                pipeline, menus.every, menus.kinds, one_batch, sampling, settings.repeats, settings.corrections
            )
    times = every_times.only(menus.chosen)
    with progress.bar("Measuring how the model responds to older features") as bar:
        surrogate = measure_surrogate(
            pipeline, menus.menu, timeline, splits.calibration, sampling, folder, settings.batch, bar
        )
    with progress.stage("Searching schedules"):
        program = DynamicProgram(surrogate, times)
        front = find_front(program)
        corrected = find_front(program.at(times.corrected())) if settings.corrections else front
    if judge is None:
        with progress.stage("Sampling the full run on validation prompts"):
            seeds = replace(sampling, seed=VALIDATION_SEED)
            place = measurement_folder(pipeline, splits.validation, seeds, 0)
            judge = Judge(pipeline, splits.validation, seeds, place, settings.batch)
    fitter = None
    if settings.corrections:
        texts = encode(pipeline, splits.calibration, sampling.guidance)
        fitter = Fitter(pipeline, timeline, texts, sampling, folder, settings.batch)
    return Choosing(surrogate, times, front, judge, menus.every, every_times, corrected, fitter)


def split_prompts(pipeline: StableDiffusionPipeline, settings: CalibrateSettings) -> Splits:
    """The prompts of the three splits; see `own_splits` for a user's own."""
    if settings.prompts is not None:
        return own_splits(
            settings.prompts, settings.calibration_prompts, settings.validation_prompts, settings.test_prompts
        )
    seen = settings.calibration_prompts + settings.validation_prompts
    split = choose_prompts(pipeline, None, seen, settings.test_prompts)
    first = settings.calibration_prompts
    captions = {caption.text: caption for caption in (*(split.seen_captions or ()), *(split.captions or ()))}
    return Splits(split.calibration[:first], split.calibration[first:] or split.calibration, split.held_out, captions)


def timed_batch(pipeline: StableDiffusionPipeline, splits: Splits, settings: CalibrateSettings) -> Tensor:
    """The text embeddings that runs are timed on, (images, branches, tokens, width): of few prompts some repeatedly."""
    prompts = list(islice(cycle(splits.test), settings.images))
    return encode(pipeline, prompts, settings.sampling.guidance)


def measured_shares(
    ways: Sequence[Way], pipeline: StableDiffusionPipeline, settings: CalibrateSettings, one_batch: Tensor
) -> list[float]:
    """Each way's time over the full run's, timed in turns."""
    sampling = settings.sampling
    loops = [way.loop(pipeline, one_batch, sampling) for way in (Way("full", sampling.steps, 0.0), *ways)]
    full, *others = time_runs(loops, settings.repeats)
    return [median_ratio(seconds, full) for seconds in others]


def _within(
    share: float | None, choosing: Choosing, settings: CalibrateSettings, one_batch: Tensor
) -> tuple[Plan, float]:
    """The plan for the goal, and its share of the time: as predicted, or as measured where that is more.

    It is searched again for less where it takes more than `share` when it is run beside the full one. Raises AsdmError
    with exit code 3 where nothing keeps that.
    """
    goal, full = settings.goal, choosing.every_times.full_run
    pipeline = choosing.judge.pipeline

    def search(aim: float | None) -> tuple[Plan, float, float]:
        plan = choose_schedule(choosing, goal, aim)
        return plan, plan.way.seconds / full, measured_shares([plan.way], pipeline, settings, one_batch)[0]

    plan, predicted, measured = search(share)
    if share is None:
        return plan, max(predicted, measured)
    aim, least = share, measured
    regular = cheapest_cache(choosing.every, choosing.every_times)
    cheapest = min(choosing.front.cheapest.share, regular.seconds / full if regular else math.inf)
    for _ in range(MOST_ROUNDS):
        if keeps_in_time(measured, share):
            break
        aim = min(aim * 0.995, share * predicted / measured)
        if aim < cheapest:
            break
        plan, predicted, measured = search(aim)
        least = min(least, measured)
    if not keeps_in_time(measured, share):
        raise over_limit(share, least)
    return plan, max(predicted, measured)


def keeps_in_time(measured: float, share: float) -> bool:
    """Whether a measured share of the time keeps a limit, within what repeated timings differ by (as in `assemble`)."""
    return measured <= share * (1 + TIMING_TOLERANCE)


def over_limit(share: float, least: float) -> AsdmError:
    """The error where all that was found for a share of the time takes more of it when it is timed."""
    return AsdmError(
        f"no schedule was found that takes {share:.4g}x of the time when it is timed beside the full run",
        f"The fastest that was timed took latency={least:.4f}x. Allow more, or calibrate on a quiet machine.",
        ExitCode.INFEASIBLE,
    )


def _rivals(choosing: Choosing, share: float, bar: Any) -> list[tuple[str, Way]]:
    """Fewer steps of the same sampler, of the best one, and DeepCache at its best branch, in a share of the time."""
    times, judge = choosing.every_times, choosing.judge
    found: list[tuple[str, Way]] = [("fewer steps", way) for way in fewer_steps(times, share, (None,))]
    groups = {
        "fewer steps, best sampler": fewer_steps(times, share, SOLVERS),
        "DeepCache": uniform_caches(choosing.every, times, share),
    }
    for role, ways in groups.items():
        if ways:
            found.append((role, judge.race(ways, progress=bar)[0]))
    return found


def _curve(choosing: Choosing, rivals: Sequence[tuple[str, Way]], count: int, bar: Any) -> Iterator[Point]:
    """What the search and each of its rivals reach on validation prompts in `count` other times."""
    times, judge = choosing.every_times, choosing.judge
    shares = np.linspace(choosing.front.cheapest.share, 1, count + 2)[1:-1]
    for number, share in enumerate(map(float, shares)):
        ways = [("schedule", choosing.chosen(share, wide=False).way)]
        for role, way in rivals:
            again = fewer_steps(times, share, (way.scheduler,))
            if isinstance(way.rule, Mode):
                (light,) = {kind_of(choosing.every, way.rule.light)[0]}
                again = uniform_caches(choosing.every.only((light,)), times.only((light,)), share)
            ways += [(role, found) for found in again]
        for role, way in ways:
            yield role, way.name, way.seconds / times.full_run, judge.score(way).mean()
        bar(number + 1, count)


def _validity(
    model: str, pipeline: StableDiffusionPipeline, timeline: Timeline, sampling: SamplingSettings
) -> Validity:
    size = initial_latents(pipeline, 1, sampling).shape
    guidance = sampling.guidance if sampling.guidance > 1 else 1.0
    return Validity(
        Path(model).name or model, mark_of(pipeline.unet), type(pipeline.scheduler).__name__, len(timeline),
        timeline.sigmas or (), guidance, (int(size[2]), int(size[3])), solver_of(pipeline.scheduler),
    )  # fmt: skip
