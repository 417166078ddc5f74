"""A student's folder with its teacher: both opened, and seen to belong together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Recipe, find_recipe, load_recipe
from asdm_compress.distillation.pairs import check_student
from asdm_compress.models.files import stored_dtype
from asdm_compress.models.loading import open_pipeline, open_unet
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.workflows.apply import check_fit

RECIPE: Final = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class StudentAndTeacher:
    """Both in fp32; `stored` is the precision of the student's own files, `hashes` are those of the two UNets."""

    source: Source
    recipe: Recipe
    plan: Plan
    student: UNet2DConditionModel
    stored: torch.dtype
    teacher_source: Source
    teacher: StableDiffusionPipeline
    hashes: tuple[str, str]

    def notes(self) -> list[str]:
        """What a user should know of the two."""
        notes = [*self.source.notes, *self.teacher_source.notes]
        known = self.recipe.provenance.get("weights")
        if known and known != self.hashes[1]:
            notes.append("the teacher's weights are not those that the student's recipe was made with")
        return notes


def open_student(
    student: str, teacher: str | None, options: LoadOptions, recipe_of: str | None = None
) -> StudentAndTeacher:
    """Open a student's folder and its teacher, by default the model that its recipe names, on the CPU.

    A folder without a recipe, as those of published students, takes the one that `recipe_of` names. Raises AsdmError
    where neither has one, and where both do, for a teacher that is not there or no whole pipeline, one of another
    architecture, and a student that is not what its recipe makes of the teacher.
    """
    exact = replace(options, dtype=torch.float32, device=torch.device("cpu"))
    source = resolve(student, exact, beside=True)
    recipe = _recipe_of(student, source, recipe_of)
    assert source.unet_folder is not None
    reference = teacher or recipe.base.model
    teacher_source = _teacher(reference, exact, asked=teacher is not None)
    pipeline = open_pipeline(teacher_source, exact)
    check_fit(recipe, pipeline.unet, reference)
    unet = open_unet(source, exact)
    plan = Plan(recipe.as_edits())
    check_student(unet, pipeline.unet, plan)
    hashes = (weights_hash(unet), weights_hash(pipeline.unet))
    stored = stored_dtype(source.unet_folder, options.allow_pickle)
    return StudentAndTeacher(source, recipe, plan, unet, stored, teacher_source, pipeline, hashes)


def _recipe_of(student: str, source: Source, named: str | None) -> Recipe:
    if source.path is None or source.unet_folder is None:
        raise AsdmError(f"{student} is no folder of a student", "Give a pipeline's folder, or a UNet's.")
    own = source.path / RECIPE
    if not own.is_file() and named is None:
        raise AsdmError(
            f"{student} is no student: it has no {RECIPE}",
            "Give a folder that `asdm-compress assemble` or `apply` wrote, or say by --recipe what it was made by.",
        )
    if own.is_file() and named is not None:
        raise AsdmError(f"{student} has a {RECIPE} of its own", "Leave --recipe out.")
    return load_recipe(own if named is None else find_recipe(named))


def _teacher(reference: str, options: LoadOptions, asked: bool) -> Source:
    try:
        source = resolve(reference, options)
    except AsdmError as error:
        if asked:
            raise
        raise AsdmError(
            f"the student's teacher cannot be opened: {error.message}",
            "Give the model that the student was made of with --teacher.",
            error.exit_code,
        ) from error
    if not source.is_pipeline:
        raise AsdmError(
            f"{reference} is a UNet alone; a training needs its text encoder and its VAE", "Give the whole pipeline."
        )
    return source
