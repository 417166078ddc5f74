"""`apply`: the plan of a recipe on another checkpoint of the family."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.calibration import DEFAULT_BANDS, Effort, check_bands, record
from asdm_compress.assembly.other_starts import copied_start, random_start
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import RefitChoice, check_plan_memory, fit_plan, for_memory, scaled_for_memory
from asdm_compress.assembly.slot_fit import check_fits, check_prompts
from asdm_compress.assembly.store import TRIPLES, measurement_folder, recorded
from asdm_compress.assembly.surgery import assemble, build, removed_tensors, specify
from asdm_compress.core.defaults import CALIBRATION_PROMPTS, HELD_OUT_PROMPTS
from asdm_compress.core.edits import conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, check_space, output_folder
from asdm_compress.core.recipe import Recipe, dump_recipe
from asdm_compress.evaluation.prompts import choose_prompts
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.families import architecture
from asdm_compress.models.lazy import lazy_unet
from asdm_compress.models.loading import open_pipeline, open_unet
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.resolve import resolve
from asdm_compress.models.saving import PLAIN, FileLayout, check_rest, copy_rest, save_pipeline, save_unet
from asdm_compress.models.single_file import write_rest
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.models.streaming import Entry
from asdm_compress.sampling.schedulers import choose_scheduler
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.workflows.card import PYTHON, Origin, write_card
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.publish import check_hub, push

PROFILE: Final = "profile.json"  # of what the model was made of, not of the model
SlotStartName = Literal["fit", "zero", "random", "copied"]


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """Tensors inherited and gone, places that brought weights along, and whether diffusers alone opens the student.

    `pushed` is the address of what was sent to the hub, if it was.
    """

    kept: int
    removed: int
    slots: int
    is_stock: bool
    pushed: str | None = None


@dataclass(frozen=True, slots=True)
class Writing:
    """Where and how the student is written.

    `repository` is where on the hub it is sent to, `command` what the card says it was made by.
    """

    out: Path
    overwrite: bool = False
    layout: FileLayout = PLAIN
    repository: str | None = None
    command: str = PYTHON


@dataclass(frozen=True, slots=True)
class SlotStart:
    """How what a recipe brings along starts on another checkpoint.

    `fit` fits it to the checkpoint's own activations, for which it samples with it, on `device`, on its own prompts or
    a user's. For more experts than `bands` there are as many bands as experts. Otherwise convolutions start from zero,
    from random kernels, or from copies of kept ones, and narrowed modules keep their largest structures: a start for a
    training, not a student.
    """

    start: SlotStartName = "fit"
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    scheduler: str | None = None
    prompts: tuple[str, ...] | None = None
    calibration_prompts: int = CALIBRATION_PROMPTS
    held_out_prompts: int = HELD_OUT_PROMPTS  # left out of a user's own, as `assemble` leaves them out
    bands: int = DEFAULT_BANDS
    effort: Effort = field(default_factory=Effort)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def run_apply(
    recipe: Recipe, model: str, writing: Writing, options: LoadOptions, start: SlotStart, progress: Progress
) -> ApplyResult:
    """Write the student of `model`: a pipeline where `model` is one, else a UNet folder.

    Raises AsdmError for a checkpoint that does not fit the recipe, naming what differs, for one that is no whole
    pipeline where convolutions are to be fitted, and for a hub that cannot be reached where it is to be sent there.
    """
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(writing.out, writing.overwrite, source.path)
        if writing.repository is not None:
            check_hub(writing.repository)
    for note in source.notes:
        progress.note(note)
    if recipe.brings_weights:
        result = _assemble(recipe, source, writing, options, start, progress)
    else:
        result = _stream(recipe, source, writing, options, progress)
    if writing.repository is None:
        return result
    with progress.stage("Sending to the hub"):
        return replace(result, pushed=push(writing.out, writing.repository))


def _assemble(
    recipe: Recipe, source: Source, writing: Writing, options: LoadOptions, start: SlotStart, progress: Progress
) -> ApplyResult:
    """Write a student that brings weights of its own along."""
    with progress.stage("Reading the model"):
        pipeline = open_pipeline(source, options) if source.is_pipeline else None
        teacher = pipeline.unet if pipeline is not None else open_unet(source, options)
    check_fit(recipe, teacher, source.name)
    plan = Plan(recipe.as_edits())
    spec = specify(teacher, plan)
    check_space(writing.out, build(spec.config, spec.edits).num_parameters() * teacher.dtype.itemsize)
    weights: SlotWeights = {}
    if (spec.slot_map or recipe.refit != "none") and start.start == "fit":
        weights = _fit(source, options, plan, recipe.refit, start, progress)
    elif start.start == "random":
        weights = random_start(teacher, plan)
    elif start.start == "copied":
        weights = copied_start(teacher, plan)
    with progress.stage("Operating"):
        student = assemble(teacher, plan, weights)
    with progress.stage("Writing"), output_folder(writing.out, writing.overwrite) as aside:
        _save(pipeline, student, aside, writing.layout)
        done = recipe
        if start.start != "fit":
            # Where the student was measured, its training section goes by that damage, which is not this student's.
            section = None if recipe.evidence is not None else recipe.distillation
            done = recipe.model_copy(update={"refit": "none", "distillation": section})
        _tell(aside, writing, done, source, teacher, student)
    slots = len({unit for unit, _ in spec.slot_map.values()})
    return ApplyResult(len(spec.weight_map), len(removed_tensors(teacher, spec)), slots, spec.is_stock)


def _stream(recipe: Recipe, source: Source, writing: Writing, options: LoadOptions, progress: Progress) -> ApplyResult:
    """Write a student whose every tensor is one of the teacher's, one at a time."""
    if source.family is not None:
        raise AsdmError(f"{source.name} has random weights: there is nothing to apply a recipe to")
    if source.kind == "pipeline folder":
        assert source.path is not None
        check_rest(source.path, options.allow_pickle)
    with lazy_unet(source, options) as lazy:
        teacher = lazy.unet
        check_fit(recipe, teacher, source.name)
        spec = specify(teacher, Plan(recipe.as_edits()))
        student = build(spec.config, spec.edits)
        entries = []
        for key, tensor in student.state_dict().items():
            source_key = spec.weight_map[key]
            dtype = options.dtype or lazy.dtype(source_key)
            entries.append(Entry(key, tuple(tensor.shape), dtype, partial(lazy.get, source_key)))
        check_space(writing.out, sum(entry.bytes for entry in entries))
        with progress.stage("Writing"), output_folder(writing.out, writing.overwrite) as aside:
            if source.kind == "single file" and source.is_pipeline:
                write_rest(source, aside, student, options, writing.layout)
            save_unet(student, entries, aside / "unet" if source.is_pipeline else aside, writing.layout)
            if source.kind == "pipeline folder":
                assert source.path is not None
                copy_rest(source.path, aside, student, options.dtype, writing.layout, (PROFILE,), options.allow_pickle)
            _tell(aside, writing, recipe, source, teacher, student)
        return ApplyResult(len(spec.weight_map), len(removed_tensors(teacher, spec)), 0, spec.is_stock)


def _tell(
    folder: Path,
    writing: Writing,
    recipe: Recipe,
    source: Source,
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
) -> None:
    """Leave the recipe and the card beside the weights.

    The recipe there names this model, which a training will ask for as the teacher, with its whole architecture, of
    which a recipe for several models leaves things open. It has nothing that was measured on the model that it was made
    for; the card says whose the evidence is.
    """
    origin = Origin(source, writing.command)
    base = recipe.base.model_copy(update={"model": origin.reference, "architecture": architecture(teacher)})
    # Neither whose weights it was made of, nor that they were trained: here they are not.
    provenance = {name: value for name, value in recipe.provenance.items() if name not in ("weights", "distilled")}
    recipe = recipe.model_copy(update={"provenance": provenance})
    kept = recipe.model_copy(update={"evidence": None, "inheritance": None, "base": base, "provenance": provenance})
    (folder / "recipe.yaml").write_text(dump_recipe(kept), encoding="utf-8")
    name = writing.repository or writing.out.name
    write_card(folder, name, origin, recipe, teacher, student, variant=writing.layout.variant)


def _fit(
    source: Source, options: LoadOptions, plan: Plan, refit: RefitChoice, start: SlotStart, progress: Progress
) -> SlotWeights:
    """Fit the plan's convolutions, and what stays, to what the model itself does, in fp32."""
    if not source.is_pipeline:
        raise AsdmError(
            "the recipe's convolutions, narrowed and refitted modules are fitted by sampling, for which a UNet alone "
            "is not enough",
            "Give the whole checkpoint, a pipeline folder or one file with text encoder and VAE, or --slot-start zero "
            "for a student that a later training fills.",
        )
    specs = [spec for spec in map(conv_spec, plan.edits.values()) if spec is not None]
    experts = max((spec.experts for spec in specs if spec.needs_timestep), default=1)
    bands = max(start.bands, experts)
    check_fits(specs, bands)
    check_bands(start.sampling.steps, bands)
    pipeline = open_pipeline(source, replace(options, dtype=torch.float32, device=start.device))
    if notice := choose_scheduler(pipeline, start.scheduler, start.sampling.steps):
        progress.note(notice)
    check_plan_memory(pipeline.unet, plan)  # before anything is recorded, which takes long
    if refit == "full" and (scaled := scaled_for_memory(pipeline.unet)):
        progress.note(f"{len(scaled)} modules are too wide for the memory here and are refitted by scales alone")
    prompts = choose_prompts(pipeline, start.prompts, start.calibration_prompts, start.held_out_prompts).calibration
    check_prompts(len(prompts), "--slot-start zero")
    # Where `assemble` keeps its own: for the same model, prompts and sampler they are the same.
    folder = measurement_folder(pipeline, prompts, start.sampling, bands, start.effort)
    with progress.bar("Recording the model's trajectories") as bar:
        calibration = recorded(
            folder / TRIPLES, lambda: record(pipeline, prompts, start.sampling, bands, bar, effort=start.effort)
        ).to(pipeline.device)
    held = for_memory(pipeline.unet, calibration)
    if len(held) < len(calibration):
        progress.note(f"fitted to {len(held)} of {len(calibration)} triples: memory holds no more")
    with progress.bar("Fitting the slots") as bar:
        # As `assemble` does: on the same model, prompts, sampler and memory the weights come out the same.
        return fit_plan(pipeline.unet, plan, held, bar, refit)


def check_fit(recipe: Recipe, teacher: UNet2DConditionModel, model: str) -> None:
    """Raise AsdmError, naming what differs, unless the UNet has the architecture that the recipe was made for."""
    found = architecture(teacher)
    differing = [
        f"{key} is {found.get(key)}, the recipe's is {value}"
        for key, value in recipe.base.architecture.items()
        if found.get(key) != value
    ]
    if differing:
        raise AsdmError(
            f"{model} does not fit the recipe made for {recipe.base.model}: {'; '.join(differing)}",
            "Make a recipe for this architecture with `asdm-compress assemble`.",
        )


def _save(
    pipeline: StableDiffusionPipeline | None, student: UNet2DConditionModel, folder: Path, layout: FileLayout
) -> None:
    if pipeline is None:
        with quiet_libraries():
            student.save_pretrained(folder, variant=layout.variant, max_shard_size=layout.shard_bytes)
        return
    pipeline.register_modules(unet=student)
    save_pipeline(pipeline, folder, layout)
