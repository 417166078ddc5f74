"""`assemble --members`: the students that switch best together within a budget of time, and who takes which step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.in_time import TIMING_TOLERANCE
from asdm_compress.assembly.ladder import SHARES, Lineup, Rung, climb, line_up
from asdm_compress.assembly.store import weights_hash
from asdm_compress.assembly.surgery import assemble
from asdm_compress.assembly.verify import Search
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, output_folder
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.core.provenance import versions
from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe
from asdm_compress.core.units import Limit
from asdm_compress.evaluation.prompts import PromptSplit
from asdm_compress.inheritance.actions import FULL
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.families import architecture
from asdm_compress.models.loading import open_pipeline
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.settings import encode
from asdm_compress.scheduling.goals import Goal
from asdm_compress.scheduling.switch_times import SKIP, time_options
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.assemble import Target, with_unet
from asdm_compress.workflows.calibrate import CalibrateSettings
from asdm_compress.workflows.calibrate_members import SwitchingFound, calibrate_members
from asdm_compress.workflows.card import Origin
from asdm_compress.workflows.plan import Measured, PlanSettings, measure
from asdm_compress.workflows.progress import Progress

TEACHER: Final = "teacher"
FILE_NAME: Final = "members.json"
SWITCH_PROMPTS: Final = 4  # that exchanges of members are measured on, and as many to choose on: each is a whole run
FASTER: Final = 0.75  # times the budget: some of the ladder's plans are made for less than it


@dataclass(frozen=True, slots=True)
class Students:
    """The ladder, who was lined up, and the names and weights, by number of rung, of those and of the best single one.

    The latter is only compared with, unless it is lined up itself.
    """

    rungs: Sequence[Rung]
    lineup: Lineup
    names: Mapping[int, str]
    weights: Mapping[int, SlotWeights]

    @property
    def bystanders(self) -> list[str]:
        """Those that are only compared with."""
        return [name for i, name in self.names.items() if i not in self.lineup.students]

    def with_teacher(self, teacher: UNet2DConditionModel) -> dict[str, UNet2DConditionModel]:
        """All of them behind their teacher, by name."""
        students = {name: assemble(teacher, self.rungs[i].plan, self.weights[i]) for i, name in self.names.items()}
        return {TEACHER: teacher, **students}

    def as_json(self, band_weights: Sequence[float]) -> dict[str, Any]:
        """The ladder from the slowest student on, and the line-up, whose students are its numbers."""
        return {
            "band_weights": list(band_weights), "lineup": self.lineup.as_json(),
            "ladder": [
                {
                    "name": self.names.get(i), "latency": rung.latency, "damage": rung.damage.total,
                    "bands": list(rung.damage.bands), "edits": {o.site: o.edit for o in rung.solution.options},
                }
                for i, rung in enumerate(self.rungs)
            ],
        }  # fmt: skip

    def line(self) -> str:
        """For the terminal."""
        times = " and ".join(f"{self.rungs[i].latency:.3f}x" for i in self.lineup.students)
        proof = "proven" if self.lineup.proven else f"with a bound of {self.lineup.bound:.3g}"
        return (
            f"Of {len(self.rungs)} students that were fitted and measured, those of {times or 'none'} switch best "
            f"together: damage {self.lineup.predicted:.3g} ({proof})."
        )


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
        raise AsdmError("the teacher is within this time already", "Ask for less than 1x.")
    with progress.stage("Timing what a step takes beside the UNet"):
        overhead = step_overhead(pipeline, measured.prompts.held_out[:1], settings)
    students = make_students(teacher, measured, share, overhead, settings, most, progress)
    found = calibrate_members(
        pipeline, students.with_teacher(teacher), _calibration(share, settings, measured.prompts), progress,
        students.bystanders,
    )  # fmt: skip
    with progress.stage("Writing"):
        stored = open_pipeline(source, replace(options, dtype=None, device=torch.device("cpu")))
        stored.scheduler = pipeline.scheduler
        taking = {action.member for action in found.switched.schedule.actions}
        used = {name: unet for name, unet in students.with_teacher(stored.unet).items() if name in taking}
        whole = with_unet(stored, SwitchedUNet2DConditionModel.of(used, found.switched.schedule))
        with output_folder(target.out, target.overwrite) as aside:
            found.write(whole, aside, models=list(used))
            measured.profile.save(aside / "profile.json")
            content = {"command": target.command, **students.as_json(measured.calibration.band_weights)}
            (aside / FILE_NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")
            (aside / "members").mkdir()
            for i, name in students.names.items():
                if name in used:
                    recipe = _recipe(Origin(source).reference, stored.unet, students.rungs[i], settings)
                    (aside / "members" / f"{name}.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return MembersResult(target.out, students, found)


def make_students(
    teacher: UNet2DConditionModel,
    measured: Measured,
    share: float,
    overhead: float,
    settings: PlanSettings,
    most: int,
    progress: Progress,
) -> Students:
    """The students that switch best together in a share of the teacher's time, from what was measured of the teacher.

    Of the teacher's time `overhead` is not its UNet's. Raises AsdmError with exit code 3 where no students take so
    little.
    """
    of_unet = max((share - overhead) / (1 - overhead), 1e-3)
    limits = (Limit("latency", of_unet, relative=True),)
    search = Search(
        teacher, measured.profile, measured.options, measured.damages, limits, measured.shape, measured.calibration,
        settings.refit,
    )  # fmt: skip
    with progress.bar("Fitting and measuring students of several sizes") as bar:
        # One of the budget itself could take all steps.
        rungs = climb(search, (*SHARES, of_unet, FASTER * of_unet), bar)
    with progress.stage("Solving for the students that switch best together"):
        weights = measured.calibration.band_weights
        lineup = line_up(rungs, weights, settings.sampling.steps, share, most, overhead)
        names = _names(rungs, (*lineup.students, *_single(rungs, of_unet)))
    with progress.stage("Fitting them to all prompts"):
        fitted = {i: search.fit(rungs[i].plan, measured.calibration) for i in names}
    return Students(rungs, lineup, names, fitted)


def step_overhead(pipeline: StableDiffusionPipeline, prompts: Sequence[str], settings: PlanSettings) -> float:
    """The part of a sampling step's time that is not the UNet's: the scheduler's, guidance, Python."""
    texts = encode(pipeline, prompts, settings.sampling.guidance)
    times = time_options(pipeline, (FULL, SKIP), texts, settings.sampling, settings.profile.repeats)
    return min(times.seconds[SKIP] / times.teacher, 0.9)


def _single(rungs: Sequence[Rung], share: float) -> tuple[int, ...]:
    """The student of least damage that could take all steps, if there is one."""
    fast = [i for i, rung in enumerate(rungs) if rung.latency <= share * (1 + TIMING_TOLERANCE)]
    return tuple(sorted(fast, key=lambda i: rungs[i].damage.total)[:1])


def _names(rungs: Sequence[Rung], students: Sequence[int]) -> dict[int, str]:
    """Names that tell a student's share of the teacher's time in percent."""
    names: dict[int, str] = {}
    for i in dict.fromkeys(students):
        name = f"student-{100 * rungs[i].latency:.0f}"
        names[i] = name if name not in names.values() else f"{name}-{i}"
    return names


def _calibration(share: float, settings: PlanSettings, prompts: PromptSplit) -> CalibrateSettings:
    """Who takes which step is chosen on some of the prompts of the fits, and reported on those kept out of them."""
    chosen = tuple(prompts.calibration[: 2 * SWITCH_PROMPTS])
    few = max(1, len(chosen) // 2)
    return CalibrateSettings(
        Goal(limit=Limit("latency", share, relative=True)), settings.sampling, None, (*chosen, *prompts.held_out),
        few, max(1, len(chosen) - few), len(prompts.held_out), repeats=settings.profile.repeats,
    )  # fmt: skip


def _recipe(model: str, stored: UNet2DConditionModel, rung: Rung, settings: PlanSettings) -> Recipe:
    return Recipe(
        asdm_recipe=1,
        base=Base(model=model, architecture=architecture(stored)),
        edits=[EditEntry(site=o.site, edit=o.edit) for o in rung.solution.options],
        refit=settings.refit,
        budget=[f"latency={rung.latency:.4f}x"],
        provenance={"versions": versions(), "weights": weights_hash(stored, in_fp32=True)},
    )
