"""`frontier`: the best plan of every budget, from what an assembly has measured or from measurements made now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.damage import measure_plan, predictions
from asdm_compress.assembly.frontier import (
    FILE_NAME,
    IMAGES_FOLDER,
    SHARES,
    Frontier,
    FrontierImage,
    Menu,
    Question,
    frontier_of,
    load_frontier,
    parse_shares_of,
)
from asdm_compress.assembly.in_time import measured_ratio
from asdm_compress.assembly.options import teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.record import FILE_NAME as ASSEMBLY
from asdm_compress.assembly.record import load_assembly
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, output_file, output_folder
from asdm_compress.core.units import Limit, Resource
from asdm_compress.evaluation.fidelity import compare_pairs
from asdm_compress.models.loading import open_pipeline
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.profile import ProfileSettings, load_profile
from asdm_compress.reporting.plots import frontier_svg
from asdm_compress.sampling.images import Samples, sample
from asdm_compress.sampling.settings import latent_side
from asdm_compress.workflows.assemble import HELD_OUT_IMAGE_SEED, with_unet
from asdm_compress.workflows.assembly_files import menu_of
from asdm_compress.workflows.plan import Measured, PlanSettings, measure
from asdm_compress.workflows.progress import Progress

PLOT = "frontier.svg"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked, by which command, and how many images of every plan."""

    question: Question
    command: str
    images: int = 0


def ask(resource: str, budgets: str | None, also: Sequence[Limit], pairs: bool, patience: float) -> Question:
    """The question that a user's words come to; raises AsdmError for words that are none."""
    name = next((r for r in get_args(Resource) if r == resource), None)
    if name is None:
        raise AsdmError(f"unknown resource {resource!r}", f"Use {', '.join(get_args(Resource))}.")
    if any(limit.resource == name for limit in also):
        raise AsdmError(f"--also limits {name}, of which the budgets are", "Limit another resource, or none.")
    return Question(name, SHARES if budgets is None else parse_shares_of(budgets), tuple(also), pairs, patience)


def is_assembly(model: str) -> bool:
    """Whether this is a folder that `assemble` wrote, with what it measured."""
    return (Path(model) / ASSEMBLY).is_file()


def of_folder(folder: Path, out: Path, wanted: Wanted, progress: Progress, overwrite: bool = False) -> Frontier:
    """The frontier of what an assembly has measured, written to `out`, which may be the folder itself.

    Only edits that the assembly had to choose from are there: those that save something of what its budget limited.
    Raises AsdmError where another frontier lies in `out`: of another model, or one whose plans were measured.
    """
    if wanted.images:
        raise AsdmError(
            f"{folder} is a student, and plans are built from a teacher",
            f"Give the model itself, with --profile {folder}/profile.json, for --images.",
        )
    record = load_assembly(folder / ASSEMBLY)
    if (out / FILE_NAME).is_file() and not overwrite:
        there = load_frontier(out / FILE_NAME)
        if there.model != record.model or any(point.measured_damage is not None for point in there.points):
            raise AsdmError(
                f"{out / FILE_NAME} is of {there.model}, with what was measured of its plans",
                "Choose another --out, or replace it with --overwrite.",
            )
    costs = load_profile(folder / "profile.json")
    options = [option.as_option() for option in record.options]
    damages = {option.name: option.damage for option in record.options}
    menu = Menu(options, damages, teacher_costs(costs), record.interaction())
    with progress.bar("Searching plans") as bar:
        found = frontier_of(menu, wanted.question, record.model, wanted.command, bar)
    _save_files(found, out)
    return found


def of_model(
    model: str,
    out: Path,
    options: LoadOptions,
    settings: PlanSettings,
    wanted: Wanted,
    progress: Progress,
    overwrite: bool = False,
) -> Frontier:
    """The frontier of a model: measures what is not kept, searches, and with images builds and fits every plan.

    `out` appears whole or not at all. Raises AsdmError for what cannot be planned.
    """
    check_output(out, overwrite)
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(out, overwrite, source.path)
        pipeline = open_pipeline(source, options)
    for note in source.notes:
        progress.note(note)
    settings = _as_profiled(settings, pipeline)
    own_scheduler = pipeline.scheduler
    question = wanted.question
    # Every resource that is asked for: only edits that save some of one are measured.
    limits = [Limit(question.resource, 1.0, relative=True), *question.also]
    measured = measure(pipeline, limits, settings, progress, model)
    menu = menu_of(measured.options, measured.damages, measured.profile)
    with progress.bar("Searching plans") as bar:
        found = frontier_of(menu, question, Path(model).name or model, wanted.command, bar)
    with output_folder(out, overwrite) as aside:
        if wanted.images:
            found = _with_images(found, pipeline, measured, settings, wanted.images, aside, progress)
        pipeline.scheduler = own_scheduler
        measured.profile.save(aside / "profile.json")
        _save_files(found, aside)
    return found


def _as_profiled(settings: PlanSettings, pipeline: StableDiffusionPipeline) -> PlanSettings:
    """Plans are timed as a known profile was made, in its batch, image size and memory format."""
    if settings.known_profile is None:
        return settings
    shape = ProfileSettings.of(load_profile(settings.known_profile), settings.profile.repeats)
    own = latent_side(pipeline, settings.sampling) * pipeline.vae_scale_factor
    if shape.image_size == own:  # which is what measurements are kept under
        shape = replace(shape, image_size=None)
    return replace(settings, profile=shape, sampling=replace(settings.sampling, image_size=shape.image_size))


def _save_files(found: Frontier, folder: Path) -> None:
    with output_file(folder / FILE_NAME) as aside:
        found.save(aside)
    with output_file(folder / PLOT) as aside:
        aside.write_text(frontier_svg(found), encoding="utf-8")


def _with_images(
    found: Frontier,
    pipeline: StableDiffusionPipeline,
    measured: Measured,
    settings: PlanSettings,
    count: int,
    folder: Path,
    progress: Progress,
) -> Frontier:
    """Every plan built and fitted: its damage on prompts kept out of the fit, its latency, its images."""
    fitting, measuring = measured.calibration.for_plans()
    teacher, timed = measured.teacher, pipeline.unet
    prompts = measured.prompts.held_out[:count]
    unseen = replace(settings.sampling, seed=HELD_OUT_IMAGE_SEED)
    (folder / IMAGES_FOLDER).mkdir()
    with progress.stage("Sampling the teacher"):
        reference = sample(pipeline, prompts, unseen)
    for i, image in enumerate(reference.images):
        image.save(folder / IMAGES_FOLDER / f"teacher-{i:02d}.png")
    points = []
    predicted = predictions(teacher, measuring)
    with progress.bar("Building, fitting and sampling every plan") as bar:
        for number, point in enumerate(found.points):
            plan = Plan({entry.site: entry.edit for entry in point.edits})
            weights = fit_plan(teacher, plan, fitting, refit=settings.refit)
            student = assemble(timed, plan, weights)
            runs = sample(with_unet(pipeline, student), prompts, unseen)
            update = {
                "measured_damage": measure_plan(teacher, plan, measuring, weights, predicted).total,
                "measured_latency": measured_ratio(timed, student, measured.shape),
                "images": _images(number, prompts, unseen.seed, reference, runs, folder),
            }
            points.append(point.model_copy(update=update))
            bar(number + 1, len(found.points))
    return found.model_copy(update={"points": points})


def _images(
    number: int, prompts: Sequence[str], first_seed: int, reference: Samples, runs: Samples, folder: Path
) -> list[FrontierImage]:
    psnr, _ = compare_pairs(runs.images, reference.images)
    images = []
    for i, (prompt, image) in enumerate(zip(prompts, runs.images, strict=True)):
        name = f"{IMAGES_FOLDER}/plan-{number:02d}-{i:02d}.png"
        image.save(folder / name)
        teacher = f"{IMAGES_FOLDER}/teacher-{i:02d}.png"
        images.append(FrontierImage(prompt=prompt, seed=first_seed + i, teacher=teacher, student=name, psnr=psnr[i]))
    return images
