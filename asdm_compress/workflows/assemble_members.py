"""`assemble --members`: the students that switch best together within a budget of time, and who takes which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, output_folder
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.core.units import Limit
from asdm_compress.evaluation.prompts import PromptSplit
from asdm_compress.models.loading import open_pipeline
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.scheduling.goals import Goal
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.assemble import Target, with_unet
from asdm_compress.workflows.calibrate import CalibrateSettings
from asdm_compress.workflows.calibrate_members import SwitchingFound, calibrate_members
from asdm_compress.workflows.card import Origin
from asdm_compress.workflows.plan import PlanSettings, measure
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.students import Students, make_students, step_overhead

TEACHER: Final = "teacher"
_WITHIN: Final = ("the teacher is within this time already", "Ask for less than 1x.")
SWITCH_PROMPTS: Final = 4  # that exchanges of members are measured on, and as many to choose on: each is a whole run


@dataclass(frozen=True, slots=True)
class MembersResult:
    """What was made: the students, and the schedule that was found for them. `out` holds the same."""

    out: Path
    students: Students
    found: SwitchingFound

    def lines(self) -> list[str]:
        """For the terminal."""
        steps = [str(action) for action in self.found.content["steps"]]
        counted = ", ".join(f"{steps.count(name)} of {name}" for name in dict.fromkeys(steps))
        return [self.students.line(), f"Steps: {counted}.", *self.found.lines()]


def run_assemble_members(
    model: str,
    limits: Sequence[Limit],
    target: Target,
    options: LoadOptions,
    settings: PlanSettings,
    progress: Progress,
    most: int,
    processes: Processes = ALONE,
) -> MembersResult | None:
    """Make at most `most` students of `model` that take turns with it, and write them as one switched pipeline.

    A ladder of plans for shares of the teacher's time is fitted and measured; which of them become members, and so
    their budgets, comes out of one integer program (see `assembly.ladder`). Who takes which step is then calibrated on
    whole runs as by `calibrate --members`, beside the best single student in the same time. Members without a step are
    left out. Of several processes the main one alone has a result. Raises AsdmError for bad input (exit code 2) and a
    budget that nothing keeps (3). The folder appears whole or not at all.
    """
    if most < 1 or len(limits) != 1 or limits[0].resource != "latency":
        raise AsdmError("students that take turns are made for a time", "Use --members 2 --budget latency=0.6x.")
    if limits[0].relative and limits[0].value >= 1:
        raise AsdmError(*_WITHIN)
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(target.out, target.overwrite, source.path)
        pipeline = open_pipeline(source, options)
    for note in source.notes:
        progress.note(note)
    teacher = pipeline.unet
    measured = measure(pipeline, limits, settings, progress, model, processes)
    processes.part()
    if not processes.is_main:
        return None
    share = limits[0].absolute(measured.profile.latency) / measured.profile.latency
    if share >= 1:
        raise AsdmError(*_WITHIN)
    with progress.stage("Timing what a step takes beside the UNet"):
        overhead = step_overhead(pipeline, measured.prompts.held_out[:1], settings)
    students = make_students(teacher, measured, share, overhead, settings, most, progress).as_stored(source, options)
    found = calibrate_members(
        pipeline, {TEACHER: teacher, **students.of(teacher)}, _calibration(share, settings, measured.prompts), progress,
        students.bystanders,
    )  # fmt: skip
    with progress.stage("Writing"):
        stored = open_pipeline(source, replace(options, dtype=None, device=torch.device("cpu")))
        stored.scheduler = pipeline.scheduler
        taking = {action.member for action in found.switched.schedule.actions}
        every = {TEACHER: stored.unet, **students.of(stored.unet)}
        used = {name: unet for name, unet in every.items() if name in taking}
        whole = with_unet(stored, SwitchedUNet2DConditionModel.of(used, found.switched.schedule))
        with output_folder(target.out, target.overwrite) as aside:
            found.write(whole, aside, models=list(used))
            measured.profile.save(aside / "profile.json")
            students.write(aside, used, Origin(source).reference, stored.unet, settings.refit, target.command)
    return MembersResult(target.out, students, found)


def _calibration(share: float, settings: PlanSettings, prompts: PromptSplit) -> CalibrateSettings:
    """Who takes which step is chosen on some of the prompts of the fits, and reported on those kept out of them."""
    chosen = tuple(prompts.calibration[: 2 * SWITCH_PROMPTS])
    few = max(1, len(chosen) // 2)
    return CalibrateSettings(
        Goal(limit=Limit("latency", share, relative=True)), settings.sampling, None, (*chosen, *prompts.held_out),
        few, max(1, len(chosen) - few), len(prompts.held_out), repeats=settings.profile.repeats,
    )  # fmt: skip
