"""`recipes`: what the bundled recipes and a user's own are, said without a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import LEVELS, Plan, edited, level_modules, place
from asdm_compress.assembly.surgery import StudentSpec, build, removed_tensors, specify
from asdm_compress.core.edits import Edit
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Recipe, bundled_recipes, load_recipe, telling_lines
from asdm_compress.models.families import usual_latent_size
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.sites import Site, find_sites
from asdm_compress.profiling.counting import MacCount, count_row_macs
from asdm_compress.reporting.drawing import draw_unet

Progress = Callable[[int, int], None]
DEFAULT_CHANNELS = 4
TOKENS = 77


@dataclass(frozen=True, slots=True)
class Description:
    """A recipe on a UNet of its architecture: what each edit is worth, and what is left, in parameters and MACs.

    `drawing` shows the UNet with what is cut out of it, `where` says of each edit's site which part of the UNet it is,
    and `sources` is what the file says of itself in the comments that it begins with.
    """

    name: str
    recipe: Recipe
    parameters: int
    teacher_parameters: int
    macs: int
    teacher_macs: int
    image_size: int
    removed: Mapping[str, int]
    removed_macs: Mapping[str, int]
    where: Mapping[str, str]
    is_stock: bool
    drawing: str
    sources: str

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
            "removed_macs": dict(self.removed_macs),
            "any_input_channels": "in_channels" not in self.recipe.base.architecture,
            "sources": self.sources,
            "stock": self.is_stock,
        }


@dataclass(frozen=True, slots=True)
class _Teacher:
    """A recipe's teacher without weights, and the MACs of its modules."""

    unet: UNet2DConditionModel
    macs: Mapping[str, MacCount]


def describe_all(progress: Progress | None = None) -> list[Description]:
    """Every bundled recipe; `progress` is told (done, total)."""
    known: dict[str, _Teacher] = {}
    paths = bundled_recipes().values()
    found = []
    for path in paths:
        found.append(describe(path, known))
        if progress:
            progress(len(found), len(paths))
    return found


def describe(path: Path, known: dict[str, _Teacher] | None = None) -> Description:
    """One recipe. Raises AsdmError for one that does not fit its own architecture, with the line of the edit.

    `known` are the teachers that other recipes were described on, to which this one's is added.
    """
    with telling_lines(path):
        return _describe(path, {} if known is None else known)


def _describe(path: Path, known: dict[str, _Teacher]) -> Description:
    recipe = load_recipe(path)
    plan = Plan(recipe.as_edits())
    size = usual_latent_size(recipe.base.model, recipe.base.architecture)
    key = json.dumps([recipe.base.architecture, size], sort_keys=True)
    if key not in known:
        unet = blank_teacher(recipe, path)
        known[key] = _Teacher(unet, count_row_macs(unet, size, size, TOKENS))
    teacher, whole = known[key].unet, known[key].macs
    spec = specify(teacher, plan)
    student = build(spec.config, spec.edits)
    # In the edited copy, unlike in a stock student, the modules have the names that they had.
    left = count_row_macs(edited(teacher, plan), size, size, TOKENS)
    removed = _removed_by_site(teacher, student, plan, spec)
    return Description(
        path.stem, recipe, _parameters(student), _parameters(teacher), left[""].total, whole[""].total, size * 8,
        removed, _removed_macs(teacher, plan, whole, left), {site: _where(teacher, site, size) for site in plan.edits},
        spec.is_stock, draw_unet(teacher, plan), _comments(path),
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


def blank_teacher(recipe: Recipe, path: Path, size: int | None = None) -> UNet2DConditionModel:
    """A UNet without weights of the recipe's architecture, for latents of so many elements a side, or the usual."""
    facts = {"in_channels": DEFAULT_CHANNELS, **recipe.base.architecture}
    facts["sample_size"] = size or usual_latent_size(recipe.base.model, facts)
    try:
        with torch.device("meta"), quiet_libraries():
            return UNet2DConditionModel(**facts)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise AsdmError(f"{path}: its architecture is none that can be built: {error}") from error


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
        modules = _modules(teacher, path, sites)
        inside = tuple(f"{module}." for module in modules)
        out = sum(weights[key].numel() for key in gone if key.startswith(inside))
        brought = [key for key, (unit, _) in spec.slot_map.items() if f"{unit}.".startswith(inside)]
        found[path] = out - sum(built[key].numel() for key in brought)
    return found


def _removed_macs(
    teacher: UNet2DConditionModel, plan: Plan, whole: Mapping[str, MacCount], left: Mapping[str, MacCount]
) -> dict[str, int]:
    """The MACs that each edit saves."""
    sites, placed = {site.path: site for site in find_sites(teacher)}, place(teacher, plan)
    found: dict[str, int] = {}
    for path in plan.edits:
        modules = _modules(teacher, path, sites)
        stays = [] if path.startswith(LEVELS) else [placed.edited_path(teacher, module) for module in modules]
        nothing = MacCount()
        saved = sum(whole.get(module, nothing).total for module in modules)
        found[path] = saved - sum(left.get(module, nothing).total for module in stays)
    return found


def _modules(teacher: UNet2DConditionModel, path: str, sites: Mapping[str, Site]) -> tuple[str, ...]:
    return level_modules(teacher, path) if path.startswith(LEVELS) else sites[path].modules


def _where(teacher: UNet2DConditionModel, path: str, size: int) -> str:
    """The part of the UNet that a site is, in words."""
    count = len(teacher.down_blocks)
    kind, number, *_ = [*path.split("."), "0"]
    if path.startswith(LEVELS):
        return f"level {number} and deeper, with the middle"
    if kind not in ("down_blocks", "up_blocks"):
        return "middle" if kind == "mid_block" else ""
    level = int(number) if kind == "down_blocks" else count - 1 - int(number)
    side = size // 2**level
    return f"{'encoder' if kind == 'down_blocks' else 'decoder'}, level {level}, {side}x{side}"


def _comments(path: Path) -> str:
    """The comments that a file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
