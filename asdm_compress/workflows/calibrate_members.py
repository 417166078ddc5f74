"""`calibrate --members`: which member of a switched UNet does which step, found for a time budget and tried."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.store import measurement_folder
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_apart, output_folder
from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import save_schedule
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.reporting.switching import Row, damages_svg
from asdm_compress.sampling.own_steps import save_own_steps
from asdm_compress.sampling.settings import SamplingSettings, check_size, check_text_to_image
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.rollouts import Judge, Score, gain
from asdm_compress.scheduling.swaps import Bench, Swaps
from asdm_compress.scheduling.switch_search import small_first
from asdm_compress.scheduling.switch_times import SKIP, StepTimes, time_options
from asdm_compress.scheduling.ways import SOLVERS, Way
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.calibrate import (
    TEST_SEED,
    VALIDATION_SEED,
    CalibrateSettings,
    keeps_in_time,
    measured_shares,
    split_prompts,
    timed_batch,
)
from asdm_compress.workflows.calibrated import decibels_ahead
from asdm_compress.workflows.members_search import MembersSearch, Round
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.switch import open_members

NEAR: Final = 3  # steps around the predicted number of T-Stitch's small ones


@dataclass(frozen=True, slots=True)
class Entrant:
    """A schedule or another way that was tried: its share of the teacher's time as measured, the mean squared error of
    its final latents on test prompts (None for another sampler), and its pictures' score there."""

    role: str
    way: Way
    share: float
    latent_error: float | None
    test: Score


@dataclass(frozen=True, slots=True)
class SwitchingFound:
    """What was found for some members; the first of `entrants` is the schedule, which is also that of `switched`."""

    switched: SwitchedUNet2DConditionModel
    sampling: SamplingSettings
    times: StepTimes
    around_teacher: Swaps
    rounds: tuple[Round, ...]
    entrants: tuple[Entrant, ...]
    content: Mapping[str, Any]

    def rows(self) -> list[Row]:
        """For the table of what was tried."""
        return [(e.role, e.way.name, e.share, e.latent_error, e.test.text()) for e in self.entrants]

    def lines(self) -> list[str]:
        """What is to be said beside it."""
        return [str(self.content["verdict"])]

    def write(self, pipeline: StableDiffusionPipeline, folder: Path, **more: Any) -> None:
        """A pipeline that has the switched UNet, its schedule, its report with what `more` there is, and its plot."""
        actions = self.switched.schedule.actions
        save_pipeline(pipeline, folder)
        save_own_steps(folder, pipeline, len(actions), self.sampling)
        save_schedule(Schedule(actions), folder / "switching.yaml")
        (folder / "calibration.json").write_text(json.dumps({**more, **self.content}, indent=1), encoding="utf-8")
        (folder / "damages.svg").write_text(damages_svg(self.around_teacher, actions), encoding="utf-8")


def run_calibrate_members(
    models: Sequence[str],
    out: Path,
    options: LoadOptions,
    settings: CalibrateSettings,
    progress: Progress,
    overwrite: bool = False,
) -> SwitchingFound:
    """Find the step → member list of least final-latent error within the goal's time, and write the switched pipeline.

    The first model is the teacher. `out` also gets `switching.yaml`, `calibration.json` and `damages.svg`. Raises
    AsdmError for bad input (exit code 2) and for a time that no list keeps (3). `out` appears whole or not at all.
    """
    check_apart(out, overwrite, models)
    if settings.goal.limit is None:
        raise AsdmError("members are calibrated for a time", "Use --budget latency=0.6x.")
    pipeline, members = open_members(models, options, progress, settings.scheduler)
    found = calibrate_members(pipeline, members, settings, progress)
    pipeline.unet = found.switched
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        found.write(pipeline, aside, models=list(models))
    return found


def calibrate_members(
    pipeline: StableDiffusionPipeline,
    members: Mapping[str, UNet2DConditionModel],
    settings: CalibrateSettings,
    progress: Progress,
    bystanders: Sequence[str] = (),
) -> SwitchingFound:
    """The step → member list of least final-latent error within the goal's time; the first member is the teacher.

    Members that are `bystanders` take no steps, but stand among the rivals, as every student that is fast enough to
    take all of them. The pipeline's UNet is a switched one afterwards. Raises AsdmError for what cannot be switched,
    and with exit code 3 for a time that no list keeps.
    """
    check_text_to_image(pipeline)
    check_size(pipeline, settings.sampling)
    sampling, (teacher, *others) = settings.sampling, (Action(member=name) for name in members)
    timeline = sampler_timeline(pipeline, sampling.steps)
    schedule = SwitchingSchedule((teacher,) * sampling.steps, timeline.timesteps, noise_of(pipeline.scheduler))
    pipeline.unet = SwitchedUNet2DConditionModel.of(members, schedule)
    choices = (teacher, *(other for other in others if other.member not in bystanders), SKIP)
    splits = split_prompts(pipeline, settings)

    def bench(prompts: tuple[str, ...], seed: int) -> Bench:
        here = replace(sampling, seed=seed)
        folder = measurement_folder(pipeline, prompts, here, 0)
        return Bench(pipeline, timeline, prompts, here, folder, settings.batch)

    one_batch = timed_batch(pipeline, splits, settings)
    with progress.stage("Timing every member's step"):
        options = tuple(dict.fromkeys((*choices, *others)))
        times = time_options(pipeline, options, one_batch, sampling, settings.repeats)
    full = times.full(sampling.steps)
    share = settings.goal.share(full)
    assert share is not None
    share = min(1.0, share)
    calibration, validation = bench(splits.calibration, sampling.seed), bench(splits.validation, VALIDATION_SEED)
    with progress.stage("Sampling the teacher"):
        truth = calibration.final_latents(schedule.actions)
        validated = validation.final_latents(schedule.actions)
    search = MembersSearch(calibration, truth, validation, validated, choices, times, progress)
    search.run(schedule.actions, share * full)
    best, measured = search.within(
        share, full, lambda actions: measured_shares([_way(actions, times)], pipeline, settings, one_batch)[0]
    )
    with progress.stage("Trying what could be done instead, in the same time"):
        seconds = max(times.run(best), measured * full)
        orders = _orders(seconds, choices, times, sampling.steps)
        timed = measured_shares([way for _, way in orders], pipeline, settings, one_batch) if orders else []
        ways = [("calibrated", _way(best, times)), *_in_time(orders, timed, max(measured, share), times)]
        ways += _fewer_steps(seconds, times, pipeline, sampling.steps)
        alone = [(other, (other,) * sampling.steps) for other in others]
        fast = [(other, every) for other, every in alone if keeps_in_time(times.run(every), seconds)]
        ways += [("one student", _way(every, times, f"{other.member} for all steps")) for other, every in fast]
        shares = measured_shares([way for _, way in ways], pipeline, settings, one_batch)
    with progress.bar("Reporting on test prompts") as bar:
        entrants = _reported(ways, shares, bench(splits.test, TEST_SEED), schedule.actions, settings, bar)
    used = {name: unet for name, unet in members.items() if name not in bystanders}
    switched = SwitchedUNet2DConditionModel.of(used, replace(schedule, actions=best))
    content = {
        "command": settings.command,
        "goal": settings.goal.as_json(),
        "sampler": {
            "scheduler": type(pipeline.scheduler).__name__, "steps": sampling.steps, "guidance": sampling.guidance,
        },
        "measured_on": {
            "processor": processor_name(), "device": str(pipeline.device), "dtype": str(pipeline.unet.dtype),
            "images_at_once": settings.images, "versions": versions(),
        },
        "prompts": {name: len(getattr(splits, name)) for name in ("calibration", "validation", "test")},
        "seconds": times.as_json(),
        "time": {"predicted_share": times.run(best) / full, "measured_share": shares[0]},
        "steps": [action.name for action in best],
        "damages": _damages(search.around_teacher),
        "rounds": [r.as_json() for r in search.rounds],
        "entrants": [
            {
                "role": e.role, "way": e.way.name, "share": e.share, "latent_error": e.latent_error,
                "test": e.test.as_json(),
            }
            for e in entrants
        ],
        "verdict": _verdict(entrants, share),
    }  # fmt: skip
    return SwitchingFound(
        switched, settings.sampling, times, search.around_teacher, tuple(search.rounds), tuple(entrants), content
    )


def _way(actions: Sequence[Action], times: StepTimes, name: str = "calibrated") -> Way:
    return Way(name, len(actions), times.run(actions), Schedule(tuple(actions)))


def _orders(budget: float, choices: Sequence[Action], times: StepTimes, steps: int) -> list[tuple[Action, Way]]:
    """T-Stitch's order with each student, in about these seconds: which of them are in time is measured."""
    teacher, *others = (choice for choice in choices if not choice.skips)
    found: list[tuple[Action, Way]] = []
    for other in others:
        order = small_first(other, teacher, steps, times, budget)
        if order is None:
            continue
        fewest = order.count(other)
        for count in range(max(fewest - NEAR, 0), min(fewest + NEAR, steps) + 1):
            actions = (other,) * count + (teacher,) * (steps - count)
            found.append((other, _way(actions, times, f"{count} steps of {other.member} first")))
    return found


def _in_time(
    orders: Sequence[tuple[Action, Way]], shares: Sequence[float], share: float, times: StepTimes
) -> Iterator[tuple[str, Way]]:
    """Of every student the order with the fewest steps of it that was measured to be in time, and its reverse."""
    timed = [(whose, way) for (whose, way), own in zip(orders, shares, strict=True) if keeps_in_time(own, share)]
    for other in dict.fromkeys(whose for whose, _ in timed):
        way = next(way for whose, way in timed if whose == other)
        assert isinstance(way.rule, Schedule)
        count = way.rule.actions.count(other)
        yield "T-Stitch's order", way
        yield "large first", _way(way.rule.actions[::-1], times, f"{count} steps of {other.member} last")


def _fewer_steps(
    budget: float, times: StepTimes, pipeline: StableDiffusionPipeline, steps: int
) -> list[tuple[str, Way]]:
    """Fewer steps of some samplers, in these seconds."""
    fewer = min(int((budget * (1 + 1e-9) - times.outside) / times.teacher), steps)
    own = type(pipeline.scheduler).__name__
    seconds = times.full(fewer)
    return [
        ("fewer steps", Way(f"{fewer} steps of {solver or own}", fewer, seconds, None, solver))
        for solver in (None, *SOLVERS)
        if fewer > 0
    ]


def _reported(
    ways: Sequence[tuple[str, Way]],
    shares: Sequence[float],
    bench: Bench,
    teacher: Sequence[Action],
    settings: CalibrateSettings,
    bar: Any,
) -> list[Entrant]:
    judge = Judge(bench.pipeline, bench.prompts, bench.settings, bench.folder, settings.batch)
    scores = judge.scores([way for _, way in ways], bar)
    truth = bench.final_latents(teacher)
    found = []
    for (role, way), share, score in zip(ways, shares, scores, strict=True):
        error = None
        if isinstance(way.rule, Schedule):
            off = bench.final_latents(way.rule.actions) - truth
            error = float(np.square(off, dtype=np.float64).mean())
        found.append(Entrant(role, way, share, error, score))
    return found


def _damages(swaps: Swaps) -> dict[str, list[float | None]]:
    """The mean squared error of the final latent when one step alone is taken by an option, by option."""
    found: dict[str, list[float | None]] = {}
    for (step, option), moved in swaps.moved.items():
        row = found.setdefault(option.name, [None] * len(swaps.schedule))
        row[step] = float(np.square(moved, dtype=np.float64).mean())
    return found


def _verdict(entrants: Sequence[Entrant], share: float) -> str:
    ours, *rivals = entrants
    said = []
    stitched = [r for r in rivals if r.role == "T-Stitch's order" and r.latent_error is not None]
    if stitched and ours.latent_error is not None:
        nearest = min(stitched, key=lambda r: r.latent_error or 0.0)
        assert nearest.latent_error is not None
        more, interval = gain(ours.test, nearest.test)
        ratio = nearest.latent_error / ours.latent_error if ours.latent_error else float("inf")
        said.append(
            f"T-Stitch's order has {ratio:.3g} times the final-latent error in {nearest.share:.3f}x of the time, where "
            f"this takes {ours.share:.3f}x; in pictures the schedule "
            f"is {decibels_ahead(more, interval)} from it."
        )
    alone = [r for r in rivals if r.role == "one student"]
    if alone:
        strongest = max(alone, key=lambda r: r.test.mean())
        more, interval = gain(ours.test, strongest.test)
        said.append(f"Against {strongest.way.name}, {strongest.share:.3f}x, it is {decibels_ahead(more, interval)}.")
    fewer = [r for r in rivals if r.role == "fewer steps"]
    if fewer:
        strongest = max(fewer, key=lambda r: r.test.mean())
        more, interval = gain(ours.test, strongest.test)
        said.append(f"Against {strongest.way.name} it is {decibels_ahead(more, interval)}.")
    if ours.share > share:
        said.append(f"Its time is {ours.share:.3f}x, over the limit of {share:.3f}x; calibrate on a quiet machine.")
    return " ".join(said) or "Nothing else fits into this time."
