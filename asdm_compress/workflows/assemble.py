"""`assemble`: plan, operate, compare with the teacher, and leave a student folder with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.calibration import record
from asdm_compress.assembly.damage import measure_plan
from asdm_compress.assembly.store import weights_hash
from asdm_compress.assembly.surgery import assemble, specify
from asdm_compress.assembly.verify import Verified
from asdm_compress.core.files import check_output, output_folder
from asdm_compress.core.provenance import versions
from asdm_compress.core.recipe import Base, Costs, EditEntry, Evidence, Recipe, dump_recipe
from asdm_compress.core.units import Limit
from asdm_compress.evaluation.prompts import HELD_OUT_SEED
from asdm_compress.evaluation.quality import Quality, assess
from asdm_compress.models.families import architecture
from asdm_compress.models.loading import LoadOptions, Source, open_pipeline, resolve
from asdm_compress.models.saving import save_pipeline
from asdm_compress.profiling.profile import Profile
from asdm_compress.reporting.assembly import GRID_COLUMNS, plan_rows, proof_text, report_content, teacher_student_grid
from asdm_compress.reporting.html import PlanRow, render_report
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.workflows.plan import PlanResult, PlanSettings, plan
from asdm_compress.workflows.progress import Progress

HELD_OUT_IMAGE_SEED = 10_000 + HELD_OUT_SEED


@dataclass(frozen=True, slots=True)
class AssembleResult:
    """What `assemble` found; the files in `out` hold the same."""

    out: Path
    recipe: Recipe
    plan: Sequence[PlanRow]
    proof: str
    quality: Quality
    is_stock: bool


def run_assemble(
    model: str,
    limits: Sequence[Limit],
    out: Path,
    options: LoadOptions,
    settings: PlanSettings,
    progress: Progress,
    overwrite: bool = False,
) -> AssembleResult:
    """Cut `model` to the budget and write the student to `out`.

    Raises AsdmError for bad input (exit code 2), a budget that no plan meets (3), and a full disk (4). `out` appears
    whole or not at all.
    """
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(out, overwrite, source.path)
        pipeline = open_pipeline(source, options)
    teacher = pipeline.unet
    own_scheduler = pipeline.scheduler
    found = plan(pipeline, limits, settings, progress, model)
    verified, chosen = found.verified, found.verified.solution.plan
    unseen = replace(settings.sampling, seed=HELD_OUT_IMAGE_SEED)
    with progress.bar("Measuring the plan on held-out prompts") as bar:
        weights = found.calibration.band_weights
        others = record(pipeline, found.prompts.held_out, unseen, settings.bands, bar, weights)
        held_out = measure_plan(teacher, chosen, others, verified.slot_weights)
    students = {"teacher": teacher, "student": verified.student}
    if verified.slot_weights:
        students["unfitted cut"] = assemble(teacher, chosen)
    runs = {}
    for who, unet in students.items():
        # Of the cut that nothing is fitted to, only the grid shows pictures.
        prompts = found.prompts.held_out if who != "unfitted cut" else found.prompts.held_out[:GRID_COLUMNS]
        with progress.bar(f"Sampling the {who}") as bar:
            runs[who] = sample(with_unet(pipeline, unet), prompts, unseen, progress=bar)
    # The reader of the bundled model's world knows pictures of that world's size only.
    captions = found.prompts.captions if unseen.image_size is None else None
    quality = assess(runs["teacher"], runs["student"], captions)
    evidence = _evidence(found.profile, verified, held_out.total)
    recipe = _recipe(model, pipeline, limits, found, evidence, settings)
    grid = teacher_student_grid(
        runs["teacher"], runs.get("unfitted cut"), runs["student"], found.prompts.held_out, unseen.seed,
        verified.latency_ratio,
    )  # fmt: skip
    is_stock = specify(teacher, chosen).is_stock
    content = report_content(recipe, verified, found.profile, found.options, found.damages, quality, grid, is_stock)
    pipeline.scheduler = own_scheduler
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        save_pipeline(_student_in_stored_precision(source, options, found, pipeline), aside)
        found.profile.save(aside / "profile.json")
        (aside / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (aside / "report.html").write_text(render_report(content), encoding="utf-8")
        grid.save(aside / "grid.png")
    rows = plan_rows(verified, found.profile, found.damages)
    return AssembleResult(out, recipe, rows, proof_text(verified, recipe.budget), quality, is_stock)


def with_unet(pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The same pipeline with another UNet; everything else is shared."""
    parts = {**pipeline.components, "unet": unet}
    twin = type(pipeline)(**parts, requires_safety_checker=pipeline.config.get("requires_safety_checker", False))
    twin.set_progress_bar_config(disable=True)
    return twin


def _student_in_stored_precision(
    source: Source, options: LoadOptions, found: PlanResult, measured: StableDiffusionPipeline
) -> StableDiffusionPipeline:
    """The student with the bytes of the teacher's own files: what it was measured in must not change what is saved."""
    teacher = open_pipeline(source, replace(options, dtype=None, device=torch.device("cpu")))
    teacher.scheduler = measured.scheduler
    verified = found.verified
    return with_unet(teacher, assemble(teacher.unet, verified.solution.plan, verified.slot_weights))


def _evidence(profile: Profile, verified: Verified, held_out_damage: float) -> Evidence:
    predicted, costs = verified.solution.costs, verified.costs
    return Evidence(
        teacher=Costs(latency=profile.latency, macs=profile.macs, params=profile.parameters),
        predicted=Costs(latency=predicted["latency"], macs=round(predicted["macs"]), params=round(predicted["params"])),
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
        base=Base(model=Path(model).name or model, architecture=architecture(pipeline.unet)),
        edits=[EditEntry(site=o.site, edit=o.edit) for o in found.verified.solution.options],
        refit=settings.refit,
        budget=[str(limit) for limit in limits],
        evidence=evidence,
        provenance={
            "versions": versions(),
            "weights": weights_hash(pipeline.unet),
            "measured_on": f"{mark.device}, {mark.dtype}, {mark.threads} threads, batch {mark.batch}",
            "calibration": f"{len(found.prompts.calibration)} prompts, {settings.bands} bands",
            "held_out": f"{len(found.prompts.held_out)} prompts, first seed {HELD_OUT_IMAGE_SEED}",
            "sampler": f"{type(pipeline.scheduler).__name__}, {sampling.steps} steps, guidance {sampling.guidance:g}, "
            f"first seed {sampling.seed}",
        },
    )
