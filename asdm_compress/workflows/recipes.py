"""`recipes`: what the bundled recipes and a user's own are, said without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import LEVELS, Plan, level_modules
from asdm_compress.assembly.surgery import StudentSpec, build, removed_tensors, specify
from asdm_compress.core.edits import Edit
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Recipe, bundled_recipes, load_recipe
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.sites import find_sites
from asdm_compress.profiling.counting import count
from asdm_compress.reporting.drawing import draw_unet

DEFAULT_CHANNELS = 4


@dataclass(frozen=True, slots=True)
class Description:
    """A recipe on a UNet of its architecture: what each edit is worth, and what is left, in parameters and MACs.

    `drawing` shows the UNet with what is cut out of it.
    """

    name: str
    recipe: Recipe
    parameters: int
    teacher_parameters: int
    macs: int
    teacher_macs: int
    image_size: int
    removed: Mapping[str, int]
    is_stock: bool
    drawing: str

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name,
            "base": self.recipe.base.model,
            "edits": self.recipe.as_edits(),
            "refit": self.recipe.refit,
            "parameters": self.parameters,
            "teacher_parameters": self.teacher_parameters,
            "macs": self.macs,
            "teacher_macs": self.teacher_macs,
            "image_size": self.image_size,
            "removed_parameters": dict(self.removed),
            "stock": self.is_stock,
        }


def describe_all() -> list[Description]:
    """Every bundled recipe."""
    return [describe(path) for path in bundled_recipes().values()]


def describe(path: Path) -> Description:
    """One recipe. Raises AsdmError for one that does not fit its own architecture."""
    recipe = load_recipe(path)
    plan = Plan(recipe.as_edits())
    teacher = blank_teacher(recipe, path)
    size = _latent_size(recipe)
    spec = specify(teacher, plan)
    student = build(spec.config, spec.edits)
    tokens = 77
    ours, whole = (count(unet, 1, size, size, tokens).macs[""].total for unet in (student, teacher))
    removed = _removed_by_site(teacher, student, plan, spec)
    return Description(
        path.stem, recipe, _parameters(student), _parameters(teacher), ours, whole, size * 8, removed, spec.is_stock,
        draw_unet(teacher, plan),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """What two recipes do at a site, or say in general."""

    what: str
    first: str
    second: str


def compare(first: Path, second: Path) -> list[Difference]:
    """Everything in which two recipes differ that changes a student."""
    one, other = load_recipe(first), load_recipe(second)
    rows = []
    facts = [recipe.base.architecture for recipe in (one, other)]
    for key in sorted({*facts[0], *facts[1]}):
        values = [str(fact.get(key, "any")) for fact in facts]
        if values[0] != values[1]:
            rows.append(Difference(f"architecture: {key}", *values))
    if one.refit != other.refit:
        rows.append(Difference("refit", one.refit, other.refit))
    edits = [recipe.as_edits() for recipe in (one, other)]
    for site in dict.fromkeys([*edits[0], *edits[1]]):
        names: list[Edit] = [edit.get(site, "kept") for edit in edits]
        if names[0] != names[1]:
            rows.append(Difference(site, *names))
    return rows


def blank_teacher(recipe: Recipe, path: Path) -> UNet2DConditionModel:
    """A UNet without weights of the recipe's architecture."""
    facts = {"in_channels": DEFAULT_CHANNELS, **recipe.base.architecture}
    try:
        with torch.device("meta"), quiet_libraries():
            return UNet2DConditionModel(**facts)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise AsdmError(f"{path}: its architecture is none that can be built: {error}") from error


def _latent_size(recipe: Recipe) -> int:
    family = FAMILIES.get(recipe.base.model)
    return family.image_size // 8 if family else 16


def _parameters(unet: UNet2DConditionModel) -> int:
    return sum(p.numel() for p in unet.parameters())


def _removed_by_site(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, plan: Plan, spec: StudentSpec
) -> dict[str, int]:
    """The parameters that each edit takes out, less those that it brings along."""
    sites = {site.path: site for site in find_sites(teacher)}
    gone, weights, built = set(removed_tensors(teacher, spec)), teacher.state_dict(), student.state_dict()
    found: dict[str, int] = {}
    for path in plan.edits:
        modules = level_modules(teacher, path) if path.startswith(LEVELS) else sites[path].modules
        inside = tuple(f"{module}." for module in modules)
        out = sum(weights[key].numel() for key in gone if key.startswith(inside))
        brought = [key for key, (unit, _) in spec.slot_map.items() if f"{unit}.".startswith(inside)]
        found[path] = out - sum(built[key].numel() for key in brought)
    return found
