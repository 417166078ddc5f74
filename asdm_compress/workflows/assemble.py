"""`assemble`: plan, operate, compare with the teacher, and leave a student folder with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.calibration import record
from asdm_compress.assembly.damage import Damage, measure_plan
from asdm_compress.assembly.frontier import FILE_NAME as FRONTIER
from asdm_compress.assembly.store import weights_hash
from asdm_compress.assembly.surgery import assemble, specify
from asdm_compress.assembly.verify import Verified
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.files import check_output, output_folder
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.core.provenance import versions
from asdm_compress.core.recipe import Base, CalibratedInheritance, Costs, EditEntry, Evidence, Recipe, dump_recipe
from asdm_compress.core.units import Limit
from asdm_compress.evaluation.prompts import HELD_OUT_SEED
from asdm_compress.evaluation.quality import Quality, assess
from asdm_compress.models.families import architecture
from asdm_compress.models.loading import open_pipeline, with_parts
from asdm_compress.models.resolve import resolve
from asdm_compress.models.rounding import rounded_as_stored
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.profiling.profile import Profile
from asdm_compress.reporting.assembly import GRID_COLUMNS, PlanRow, plan_rows, teacher_student_grid
from asdm_compress.sampling.images import Samples, sample
from asdm_compress.sampling.run import check_one_evaluation_per_step
from asdm_compress.sampling.schedulers import sample_alike
from asdm_compress.sampling.settings import SamplingSettings, check_size
from asdm_compress.scheduling.goals import Goal
from asdm_compress.scheduling.measure import check_inheritable
from asdm_compress.scheduling.timing import REPEATS
from asdm_compress.workflows.assembly_files import Facts, assembly_record, frontier_record, save_assembly
from asdm_compress.workflows.calibrate import CalibrateSettings, find_schedule, write_schedule
from asdm_compress.workflows.calibrated import Calibrated
from asdm_compress.workflows.card import PYTHON, Origin, write_card
from asdm_compress.workflows.plan import PlanResult, PlanSettings, choose, measure
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.report import write_report
from asdm_compress.workflows.training_section import training_section

HELD_OUT_IMAGE_SEED = 10_000 + HELD_OUT_SEED
FAR_OFF = 0.1  # of the predicted time, that a quiet machine's timings do not differ by
SCHEDULE_PROMPTS = 8  # of each kind at most, so that a schedule takes a small part of the main job's time


@dataclass(frozen=True, slots=True)
class Target:
    """Where the student is written, and what its card says that it was made by."""

    out: Path
    overwrite: bool = False
    command: str = PYTHON


@dataclass(frozen=True, slots=True)
class AssembleResult:
    """What `assemble` found; the files in `out` hold the same.

    `refused` says why a schedule that was asked for is not there; the student is there all the same.
    """

    out: Path
    recipe: Recipe
    plan: Sequence[PlanRow]
    proof: str
    quality: Quality
    is_stock: bool
    inheritance: Calibrated | None = None
    refused: AsdmError | None = None


def run_assemble(
    model: str,
    limits: Sequence[Limit],
    target: Target,
    options: LoadOptions,
    settings: PlanSettings,
    progress: Progress,
    processes: Processes = ALONE,
    inherit: Limit | None = None,
) -> AssembleResult | None:
    """Cut `model` to the budget and write the student to `target.out`.

    With `inherit` a schedule of feature inheritance is calibrated for the student, to that share of its own time.
    Of several processes the main one alone has a result; the others help it to measure (see `measure`). Raises
    AsdmError for bad input and a full disk (exit code 2) and a budget that no plan meets (3). The folder appears whole
    or not at all.
    """
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(target.out, target.overwrite, source.path)
        pipeline = open_pipeline(source, options)
    for note in source.notes:
        progress.note(note)
    _check_schedule(inherit, pipeline, settings)
    teacher = pipeline.unet
    own_scheduler = pipeline.scheduler
    measured = measure(pipeline, limits, settings, progress, model, processes)
    processes.part()
    if not processes.is_main:
        return None
    found = _as_stored(choose(pipeline, measured, settings, progress), teacher, source, options)
    _note_timing(found, progress)
    verified, chosen = found.verified, found.verified.solution.plan
    unseen = replace(settings.sampling, seed=HELD_OUT_IMAGE_SEED)
    held_out = _held_out_damage(with_unet(pipeline, measured.teacher), found, unseen, settings.bands, progress)
    runs = _pictures(pipeline, found, unseen, progress)
    # The reader of the bundled model's world knows pictures of that world's size only.
    captions = found.prompts.captions if unseen.image_size is None else None
    quality = assess(runs["teacher"], runs["student"], captions)
    evidence = _evidence(found.profile, verified, held_out.total)
    recipe = _recipe(Origin(source).reference, pipeline, limits, found, evidence, settings)
    grid = teacher_student_grid(
        runs["teacher"], runs.get("unfitted cut"), runs["student"], found.prompts.held_out, unseen.seed,
        verified.latency_ratio,
    )  # fmt: skip
    is_stock = specify(teacher, chosen).is_stock
    with progress.stage("Profiling the student"):
        facts = Facts(recipe.base.model, target.command, recipe.budget, unseen, measured.shape)
        details = assembly_record(pipeline, found, held_out, quality, runs, facts, is_stock)
    frontier = frontier_record(found, limits, recipe.base.model, target.command, progress)
    schedule = _calibrated(target.out.name, pipeline, verified, settings, inherit, progress)
    recipe = recipe.model_copy(update={"inheritance": schedule.entry()})
    pipeline.scheduler = schedule.sampler_of_student(pipeline, own_scheduler, progress)
    with progress.stage("Writing"), output_folder(target.out, target.overwrite) as aside:
        stored, teachers = _student_in_stored_precision(source, options, found, pipeline)
        recipe = recipe.model_copy(update={"provenance": {**recipe.provenance, "weights": teachers}})
        save_pipeline(stored, aside)
        found.profile.save(aside / "profile.json")
        (aside / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        save_assembly(details, runs, aside)
        if frontier is not None:
            frontier.save(aside / FRONTIER)
        grid.save(aside / "grid.png")
        origin = Origin(source, target.command)
        write_card(aside, target.out.name, origin, recipe, teacher, verified.student, measured_here=True)
        schedule.write(aside)
    with progress.stage("Writing the report"):
        write_report(target.out, target.out.name)
    rows = plan_rows(verified, found.profile, found.damages)
    return AssembleResult(
        target.out, recipe, rows, details.proof, quality, is_stock, schedule.calibrated, schedule.refused
    )


def _held_out_damage(
    pipeline: StableDiffusionPipeline, found: PlanResult, settings: SamplingSettings, bands: int, progress: Progress
) -> Damage:
    """The damage of the plan on prompts that nothing has seen; the UNet is in the precision of all damages."""
    verified = found.verified
    with progress.bar("Measuring the plan on held-out prompts") as bar:
        others = record(pipeline, found.prompts.held_out, settings, bands, bar, found.calibration.band_weights)
        return measure_plan(pipeline.unet, verified.solution.plan, others, verified.slot_weights)


def _pictures(
    pipeline: StableDiffusionPipeline, found: PlanResult, settings: SamplingSettings, progress: Progress
) -> dict[str, Samples]:
    """What teacher and student draw from the held-out prompts, and the same cut with nothing fitted, where that is."""
    verified = found.verified
    students = {"teacher": pipeline.unet, "student": verified.student}
    if verified.slot_weights:
        students["unfitted cut"] = assemble(pipeline.unet, verified.solution.plan)
    runs = {}
    for who, unet in students.items():
        # Of the cut that nothing is fitted to, only the grid shows pictures.
        prompts = found.prompts.held_out if who != "unfitted cut" else found.prompts.held_out[:GRID_COLUMNS]
        with progress.bar(f"Sampling the {who}") as bar:
            runs[who] = sample(with_unet(pipeline, unet), prompts, settings, progress=bar)
    return runs


def with_unet(pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The same pipeline with another UNet; everything else is shared."""
    twin = with_parts(pipeline, unet=unet)
    twin.set_progress_bar_config(disable=True)
    return twin


@dataclass(frozen=True, slots=True)
class _Schedule:
    """What was calibrated for a student, if anything was."""

    model: str
    calibrated: Calibrated | None = None
    settings: CalibrateSettings | None = None
    refused: AsdmError | None = None

    def sampler_of_student(self, pipeline: StableDiffusionPipeline, own: Any, progress: Progress) -> Any:
        """The model's own, or the one that the schedule was calibrated for, without which it is refused."""
        if self.calibrated is None:
            return own
        if not sample_alike(pipeline.scheduler, own):
            progress.note(f"the student keeps the sampler of its schedule, {type(pipeline.scheduler).__name__}")
        return pipeline.scheduler

    def entry(self) -> CalibratedInheritance | None:
        """For the recipe."""
        if self.calibrated is None or self.settings is None:
            return None
        ours, sampling = self.calibrated.contestants[0], self.settings.sampling
        scheduler = type(self.calibrated.choosing.judge.pipeline.scheduler).__name__
        return CalibratedInheritance(
            schedule="inheritance.yaml",
            budget=str(self.settings.goal.limit),
            sampler=f"{scheduler}, {sampling.steps} steps, guidance {sampling.guidance:g}",
            measured_share=round(ours.share, 4),
            psnr=round(ours.test.mean(), 2),
        )

    def write(self, folder: Path) -> None:
        """The schedule and its report into the student's folder."""
        if self.calibrated is not None and self.settings is not None:
            write_schedule(folder, self.model, self.calibrated, self.settings)


def _check_schedule(inherit: Limit | None, pipeline: StableDiffusionPipeline, settings: PlanSettings) -> None:
    """Refuse now what `_calibrated` would refuse last, when everything else is there.

    And a model's own sampler of several calls per step, which stays the student's: the schedule would be for another.
    """
    if inherit is not None:
        check_size(pipeline, settings.sampling)
        check_inheritable(settings.sampling.steps)
        if settings.scheduler is None:
            check_one_evaluation_per_step(pipeline.scheduler, settings.sampling.steps)


def _calibrated(
    name: str,
    pipeline: StableDiffusionPipeline,
    verified: Verified,
    settings: PlanSettings,
    inherit: Limit | None,
    progress: Progress,
) -> _Schedule:
    """A schedule for the student under the sampler that it was measured with, from a few of as many prompts."""
    if inherit is None:
        return _Schedule(name)
    few = min(settings.calibration_prompts, SCHEDULE_PROMPTS)
    wanted = CalibrateSettings(
        Goal(limit=inherit), settings.sampling, None, settings.prompts, few, few,
        min(settings.held_out_prompts, SCHEDULE_PROMPTS), repeats=min(settings.profile.repeats, REPEATS), curve=0,
    )  # fmt: skip
    try:
        return _Schedule(name, find_schedule(with_unet(pipeline, verified.student), wanted, progress), wanted)
    except AsdmError as error:
        if error.exit_code != ExitCode.INFEASIBLE:
            raise
        return _Schedule(name, refused=error)  # which is no reason to lose the student


def _note_timing(found: PlanResult, progress: Progress) -> None:
    """Say so where a student was timed far from what was predicted."""
    if not found.verified.solution.plan.edits:
        progress.note("the teacher keeps this budget as it is: nothing is cut")
    measured, predicted = found.verified.latency_ratio, found.verified.solution.costs["latency"] / found.profile.latency
    if abs(measured / predicted - 1) > FAR_OFF:
        progress.note(
            f"the student was timed at {measured:.3f}x and predicted to take {predicted:.3f}x: something else may have "
            "been running; make it again when the machine is quiet, with more --repeats"
        )


def _as_stored(found: PlanResult, teacher: UNet2DConditionModel, source: Source, options: LoadOptions) -> PlanResult:
    """With the plan's own weights rounded as they will be stored: what is measured from here on is what is written."""
    verified = found.verified
    weights = rounded_as_stored(verified.slot_weights, source, options)
    student = assemble(teacher, verified.solution.plan, weights)
    return replace(found, verified=replace(verified, slot_weights=weights, student=student))


def _student_in_stored_precision(
    source: Source, options: LoadOptions, found: PlanResult, measured: StableDiffusionPipeline
) -> tuple[StableDiffusionPipeline, str]:
    """The student with the bytes of the teacher's own files, what it was measured in must not change what is saved; and
    the hash of the teacher's weights, as whoever opens it in fp32 finds it."""
    teacher = open_pipeline(source, replace(options, dtype=None, device=torch.device("cpu")))
    teacher.scheduler = measured.scheduler
    verified = found.verified
    student = assemble(teacher.unet, verified.solution.plan, verified.slot_weights)
    return with_unet(teacher, student), weights_hash(teacher.unet, in_fp32=True)


def _evidence(profile: Profile, verified: Verified, held_out_damage: float) -> Evidence:
    predicted, costs = verified.solution.costs, verified.costs
    seconds = verified.predicted_latency_ratio * profile.latency
    return Evidence(
        teacher=Costs(latency=profile.latency, macs=profile.macs, params=profile.parameters),
        predicted=Costs(latency=seconds, macs=round(predicted["macs"]), params=round(predicted["params"])),
        measured=Costs(latency=costs["latency"], macs=int(costs["macs"]), params=int(costs["params"])),
        measured_latency_ratio=round(verified.latency_ratio, 4),
        solved_for=[str(limit) for limit in verified.solved_for],
        predicted_damage=verified.predicted_damage,
        summed_damage=verified.solution.damage,
        measured_damage=verified.measured_damage,
        held_out_damage=held_out_damage,
        damage_bound=verified.solution.bound,
        proven_optimal=verified.solution.proven,
    )


def _recipe(
    model: str,
    pipeline: StableDiffusionPipeline,
    limits: Sequence[Limit],
    found: PlanResult,
    evidence: Evidence,
    settings: PlanSettings,
) -> Recipe:
    sampling: SamplingSettings = settings.sampling
    mark = found.profile.fingerprint
    return Recipe(
        asdm_recipe=1,
        base=Base(model=model, architecture=architecture(pipeline.unet)),
        edits=[EditEntry(site=o.site, edit=o.edit) for o in found.verified.solution.options],
        refit=settings.refit,
        distillation=training_section(
            pipeline, found.verified.student, found.verified.solution.plan, evidence.held_out_damage
        ),
        budget=[str(limit) for limit in limits],
        evidence=evidence,
        provenance={
            "versions": versions(),
            "measured_on": f"{mark.device}, {mark.dtype}, {mark.threads} threads, batch {mark.batch}",
            "calibration": f"{len(found.prompts.calibration)} prompts, {len(found.calibration)} triples, "
            f"{settings.bands} bands",
            "held_out": f"{len(found.prompts.held_out)} prompts, first seed {HELD_OUT_IMAGE_SEED}",
            "sampler": f"{type(pipeline.scheduler).__name__}, {sampling.steps} steps, guidance {sampling.guidance:g}, "
            f"first seed {sampling.seed}",
        },
    )
