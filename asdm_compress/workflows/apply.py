"""`apply`: the plan of a recipe on another checkpoint of the family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble, removed_tensors, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, output_folder
from asdm_compress.core.recipe import Recipe, dump_recipe
from asdm_compress.models.families import architecture
from asdm_compress.models.loading import LoadOptions, open_pipeline, open_unet, resolve
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.saving import save_pipeline
from asdm_compress.workflows.progress import Progress


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """Tensors inherited and tensors gone, and whether diffusers alone opens the student."""

    kept: int
    removed: int
    is_stock: bool


def run_apply(
    recipe: Recipe, model: str, out: Path, options: LoadOptions, progress: Progress, overwrite: bool = False
) -> ApplyResult:
    """Write the student of `model` to `out`: a pipeline where `model` is one, else a UNet folder.

    Raises AsdmError for a checkpoint that does not fit the recipe, naming what differs.
    """
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(out, overwrite, source.path)
        pipeline = open_pipeline(source, options) if source.kind == "pipeline folder" else None
        teacher = pipeline.unet if pipeline is not None else open_unet(source, options)
    check_fit(recipe, teacher, model)
    plan = Plan(recipe.as_edits())
    with progress.stage("Operating"):
        spec = specify(teacher, plan)
        student = assemble(teacher, plan)
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        _save(pipeline, student, aside)
        kept = recipe.model_copy(update={"evidence": None})
        (aside / "recipe.yaml").write_text(dump_recipe(kept), encoding="utf-8")
    return ApplyResult(len(spec.weight_map), len(removed_tensors(teacher, spec)), spec.is_stock)


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


def _save(pipeline: StableDiffusionPipeline | None, student: UNet2DConditionModel, folder: Path) -> None:
    if pipeline is None:
        with quiet_libraries():
            student.save_pretrained(folder)
        return
    pipeline.register_modules(unet=student)
    save_pipeline(pipeline, folder)
