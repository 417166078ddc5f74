"""`lora`: a teacher's LoRA for a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asdm_compress.assembly.lora import remap_lora, remap_metadata
from asdm_compress.assembly.plan import Plan
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, output_file
from asdm_compress.core.recipe import load_recipe, telling_lines
from asdm_compress.models.files import check_safetensors
from asdm_compress.models.recognise import check_numbers
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.recipes import blank_teacher


@dataclass(frozen=True, slots=True)
class LoraResult:
    """How many tensors were kept, and which of the LoRA's modules were left out, with why."""

    out: Path
    kept: int
    left_out: Mapping[str, str]


def run_lora(lora: Path, student: Path, out: Path, progress: Progress, overwrite: bool = False) -> LoraResult:
    """Rename a LoRA trained on the teacher for the student in a folder that `assemble` or `apply` wrote.

    Raises AsdmError for a folder without a recipe, a file that is no LoRA or is damaged, and one of another model.
    """
    check_output(out, overwrite, lora)
    if not lora.is_file():
        raise AsdmError(f"there is no file {lora}", "Check the path.")
    if lora.suffix != ".safetensors":
        raise AsdmError(f"{lora} is no .safetensors file", "Give the LoRA's file.")
    check_safetensors(lora)
    recipe_path = student / "recipe.yaml"
    if not recipe_path.is_file():
        raise AsdmError(f"{student} has no recipe.yaml", "Give a folder that `assemble` or `apply` wrote.")
    with progress.stage("Renaming"):
        recipe = load_recipe(recipe_path)
        teacher = blank_teacher(recipe, recipe_path)
        tensors = load_file(lora)
        check_numbers(lora, tensors)
        with safe_open(lora, framework="pt") as file:  # programs read a LoRA's scales and words from it
            told = {"format": "pt", **(file.metadata() or {})}
        with telling_lines(recipe_path):
            found = remap_lora(tensors, teacher, Plan(recipe.as_edits()))
            metadata = remap_metadata(told, teacher, Plan(recipe.as_edits()))
    with progress.stage("Writing"), output_file(out) as aside:
        save_file(dict(found.tensors), aside, metadata=metadata)
    return LoraResult(out, len(found.tensors), found.left_out)
