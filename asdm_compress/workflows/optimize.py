"""`optimize`: one budget of time for a whole image, spent on steps, sampler, members, inheritance and guidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.slot_fit import FEWEST_PROMPTS
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.files import check_apart, output_folder
from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.core.units import Limit
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import save_schedule
from asdm_compress.models.resolve import resolve
from asdm_compress.models.saving import link_equal_files, save_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.reporting.frontier import frontier_svg
from asdm_compress.sampling.own_steps import save_own_steps
from asdm_compress.sampling.run import check_one_evaluation_per_step
from asdm_compress.sampling.settings import SamplingSettings, check_size, check_text_to_image
from asdm_compress.workflows.budget_search import LONGER, Search, open_instruments
from asdm_compress.workflows.calibrate import CalibrateSettings, keeps_in_time, split_prompts
from asdm_compress.workflows.candidates import FIDELITY, Candidate, Criterion, best_within, frontier_of
from asdm_compress.workflows.card import Origin
from asdm_compress.workflows.plan import PlanSettings, measure
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.students import Students, make_students, step_overhead
from asdm_compress.workflows.switch import open_models

STEP_SHARE: Final = 1 / median(LONGER)  # of the teacher's time, that a step of a tried schedule has on average


@dataclass(frozen=True, slots=True)
class Optimized:
    """What `optimize` found: the best within the budget, everything that was tried, and the students that it made."""

    out: Path
    best: Candidate
    tried: tuple[Candidate, ...]
    content: Mapping[str, Any]
    students: Students | None = None
    what: str = "PSNR"  # of what the columns of scores are

    def rows(self) -> list[tuple[bool, str, float, str, str]]:
        """For the table, the fastest first: whether it is the best, the way, its time, both scores. Each way once."""
        by_key: dict[str, Candidate] = {}
        judged = sorted(self.tried, key=lambda c: c.worth is None)  # of a way that was timed twice what says more
        for candidate in (self.best, *judged):
            by_key.setdefault(candidate.way.key, candidate)
        return [
            (
                c is self.best, f"{c.role}: {c.way.name}", c.share,
                *(c.texts() if self.best.worth is None or c.worth is not None else ("", "")),
            )
            for c in sorted(by_key.values(), key=lambda c: c.share)
        ]  # fmt: skip

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """What nothing that is faster is as good as, on validation prompts."""
        return frontier_of(self.tried)


@dataclass(frozen=True, slots=True)
class Make:
    """Students to make: at most how many, and what they are searched with. Its prompts are taken from the settings."""

    most: int
    plan: PlanSettings = field(default_factory=PlanSettings)


def run_optimize(
    models: Sequence[str],
    out: Path,
    options: LoadOptions,
    settings: CalibrateSettings,
    progress: Progress,
    overwrite: bool = False,
    make: Make | None = None,
    criterion: Criterion = FIDELITY,
) -> Optimized:
    """Find the way of sampling within the goal's time that comes nearest to the first model's full run, and write it.

    With quality as the `criterion`, that whose pictures show most of their prompts and are like the full run's as a
    set.

    The other models are students that it may switch to; where there are none, `make` says to make some first. For the
    samplers and numbers of steps that the time allows, every step's member, what it inherits and whether guidance is
    reused are solved for together, from exchanges that are measured; everything on the frontier is measured on prompts
    that chose nothing. Raises AsdmError for bad input (exit code 2) and for a time that nothing keeps (3). `out`
    appears whole or not at all.
    """
    check_apart(out, overwrite, models)
    if settings.goal.limit is None:
        raise AsdmError("optimize takes a budget of time", "Use --budget latency=0.33x.")
    if settings.goal.limit.relative and settings.goal.limit.value >= 1:
        raise AsdmError("the full run is within this time already", "Ask for less than 1x.")
    pipeline, members = open_models(models, options, progress, settings.scheduler)
    check_text_to_image(pipeline)
    check_size(pipeline, settings.sampling)
    check_one_evaluation_per_step(pipeline.scheduler, settings.sampling.steps)  # what all is compared with is its own
    instruments = open_instruments(pipeline, settings, criterion, progress)
    teacher, students = pipeline.unet, None if make is None else _students(pipeline, settings, make, models, progress)
    if students is not None:
        made = students.of(teacher)
        # The model itself may have the name of one, if it was a student.
        members = {"teacher" if name in made else name: unet for name, unet in members.items()} | made
    search = Search(pipeline, members, settings, progress, instruments)
    whole = search.whole / settings.images
    share = settings.goal.limit.absolute(whole) / whole
    if share >= 1:
        raise AsdmError("the full run is within this time already", "Ask for less than 1x.")
    tried = search.tried(share)
    with progress.stage("Timing the best again"):
        tried, chosen = _confirmed(search, tried, share)
    if chosen is None:
        raise AsdmError(
            f"nothing was found that takes {share:.4g}x of the time of a whole image",
            f"Reached was latency={min(c.share for c in tried):.3f}x."
            if tried
            else f"The least that is tried takes latency={search.least:.3f}x.",
            ExitCode.INFEASIBLE,
        )
    tried = search.tested(tried)
    best = tried[chosen]  # by its place: two ways may come to the same, timed each by itself
    content: dict[str, Any] = {
        "command": settings.command, "models": list(models), "goal": settings.goal.as_json(), "share": share,
        "criterion": criterion.name,
        "reference": {"scheduler": search.sampler, "steps": settings.sampling.steps, "seconds": search.whole,
                      "outside_the_unet_loop": search.outside, "decoding": search.decoding},
        "measured_on": {"processor": processor_name(), "device": str(pipeline.device),
                        "dtype": str(pipeline.unet.dtype), "images_at_once": settings.images, "versions": versions()},
        "best": best.as_json(), "tried": [c.as_json() for c in tried],
        "students": None if students is None else students.as_json(),
    }  # fmt: skip
    if criterion.is_quality:
        judges = {"worth": search.quality, "test_worth": search.tested_quality}
        content["reference"] |= {name: judge.full.as_json() for name, judge in judges.items()}
        content["judged_by"] = list(search.quality.names)
        content["networks"] = [record.model_dump() for record in search.quality.instruments.records]
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        content["frontier"] = _write(aside, search, best, frontier_of(tried))
        (aside / "optimize.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (aside / "frontier.svg").write_text(_plot(search, tried, share), encoding="utf-8")
        if students is not None:
            origin = Origin(resolve(models[0], options))
            refit = make.plan.refit if make else "none"
            students.write(aside, students.names.values(), origin.reference, teacher, refit, settings.command)
    what = "; ".join(search.quality.names) if criterion.is_quality else "PSNR"
    return Optimized(out, best, tuple(tried), content, students, what)


def _confirmed(search: Search, tried: Sequence[Candidate], share: float) -> tuple[list[Candidate], int | None]:
    """The place of the best within a share of the time, and all with the time of those that were timed again for it.

    Of dozens that are timed at once the fastest are also those that were lucky: what is chosen keeps the time when it
    is timed beside the full run alone, too, and what does not is no longer within it.
    """
    found = list(tried)
    while (chosen := best_within(found, share)) is not None:
        again = search.shares([found[chosen].way])[0]
        kept = keeps_in_time(again, share)
        found[chosen] = replace(found[chosen], share=again)
        if kept:
            break
    return found, chosen


def _students(
    pipeline: StableDiffusionPipeline,
    settings: CalibrateSettings,
    make: Make,
    models: Sequence[str],
    progress: Progress,
) -> Students | None:
    """Students for the time that a step has on average; None, with a note, where none take so little.

    Schedules are tried with several times as many steps as the teacher alone has time for, whatever the budget; what
    more is to be saved of a step is left to inheritance. Of a user's own prompts those for the test are kept from the
    students too.
    """
    if len(models) > 1:
        raise AsdmError("students are given and are to be made", "Use --members or --students.")
    if make.most < 1:
        raise AsdmError(f"{make.most} students cannot be made", "Use --students 2.")
    plan = replace(make.plan, sampling=settings.sampling, scheduler=None)
    if settings.prompts is not None:
        splits = split_prompts(pipeline, settings)
        seen = tuple(dict.fromkeys((*splits.calibration, *splits.validation)))
        is_fitted = make.plan.slot != "none" or make.plan.narrow or make.plan.refit != "none"
        if is_fitted and len(seen) <= FEWEST_PROMPTS:
            raise AsdmError(
                f"of these prompts students would be fitted on {len(seen) - 1}, which are too few",
                "Give more prompts, more of them for --calibration-prompts and --validation-prompts beside "
                "--test-prompts, or the students themselves by --members.",
            )
        plan = replace(plan, prompts=seen, calibration_prompts=max(1, len(seen) - 1), held_out_prompts=1)
    limits = [Limit("latency", STEP_SHARE, relative=True)]
    try:
        measured = measure(pipeline, limits, plan, progress, models[0])
        with progress.stage("Timing what a step takes beside the UNet"):
            overhead = step_overhead(pipeline, measured.prompts.held_out[:1], plan)
        return make_students(pipeline.unet, measured, STEP_SHARE, overhead, plan, make.most, progress)
    except AsdmError as error:
        if error.exit_code != ExitCode.INFEASIBLE:
            raise
        progress.note(f"no students are made: {error}")
        return None


def _write(
    folder: Path, search: Search, best: Candidate, frontier: Sequence[Candidate]
) -> list[dict[str, str | int | None]]:
    """The best as a pipeline, and the rest of the frontier as others below it, the fastest first.

    What is said of each of the frontier: its steps and sampler, and its folder. They have the same weights, which lie
    there once.
    """
    used = search.used((best, *frontier))  # no weights of others are written
    sampling = search.settings.sampling
    _save(search.ready(best, used), sampling, best.way.steps, folder)
    found: list[dict[str, str | int | None]] = []
    for number, candidate in enumerate(frontier, start=1):
        way, name = candidate.way, "."
        if way.key != best.way.key:
            name = f"frontier/{number}"
            _save(search.ready(candidate, used), sampling, way.steps, folder / name)
            link_equal_files(folder / name, folder)
        found.append({"way": way.name, "steps": way.steps, "scheduler": way.scheduler, "folder": name})
    return found


def _plot(search: Search, tried: Sequence[Candidate], share: float) -> str:
    """What every candidate is on test prompts, over its time."""
    if not search.by_quality:
        return frontier_svg([(c.role, c.share, c.test.mean()) for c in tried if c.test], share)
    shown, _ = search.quality.names
    points = [(c.role, c.share, c.test_worth.mean()) for c in tried if c.test_worth]
    return frontier_svg(points, share, shown, search.tested_quality.full.mean())


def _save(
    ready: tuple[StableDiffusionPipeline, Schedule | None], sampling: SamplingSettings, steps: int, folder: Path
) -> None:
    pipeline, schedule = ready
    save_pipeline(pipeline, folder)
    save_own_steps(folder, pipeline, steps, sampling)
    if schedule is not None:
        save_schedule(schedule, folder / "inheritance.yaml")
