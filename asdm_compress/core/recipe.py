"""The recipe: a plan as a file that people read, edit, compare, and replay on other checkpoints."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from asdm_compress.core.checked_yaml import Strict, as_yaml, read_checked
from asdm_compress.core.distillation import Distillation
from asdm_compress.core.edits import EDIT_GRAMMAR, SHARED, Edit, conv_spec, has_weights
from asdm_compress.core.errors import AsdmError, SiteError


class Base(Strict):
    """What the recipe was made for. A checkpoint with another architecture is refused."""

    model: str
    architecture: dict[str, Any]


class EditEntry(Strict):
    """One edit: a site's path, and the edit's name, such as `drop`, `narrow0.5` or `conv3x3*8@timestep`."""

    site: str = Field(min_length=1)
    edit: str

    @field_validator("edit")
    @classmethod
    def _is_edit(cls, value: str) -> str:
        try:
            conv_spec(value)
        except AsdmError as error:
            raise ValueError(f"{error}; edits are written like {EDIT_GRAMMAR}") from error
        return value


class Costs(Strict):
    """Costs of one UNet; seconds hold for the machine and settings in `profile.json` only."""

    latency: float = Field(gt=0)
    macs: int = Field(gt=0)
    params: int = Field(gt=0)


class Evidence(Strict):
    """What the search predicted and what was then measured, beside the teacher's own costs.

    Damages are weighted relative squared errors of the noise prediction; `held_out` ones are from prompts and seeds
    that the search has not seen. `summed` is what the search minimised and `damage_bound` bounds, `predicted` that
    times what the other plans searched were off by, as is the latency in `predicted`. `solved_for` is what the proof of
    optimality holds for: the budget itself, or a tighter one where a first plan measured slower than predicted.
    """

    teacher: Costs
    predicted: Costs
    measured: Costs
    measured_latency_ratio: float
    solved_for: list[str]
    predicted_damage: float
    summed_damage: float | None = None
    measured_damage: float
    held_out_damage: float
    damage_bound: float
    proven_optimal: bool


class CalibratedInheritance(Strict):
    """The schedule of feature inheritance in the student's folder, and what it does on prompts that chose nothing.

    `measured_share` is its time over that of the student's full run, `psnr` in dB against the student's own images.
    """

    schedule: str
    budget: str
    sampler: str
    measured_share: float
    psnr: float


class Recipe(Strict):
    """A whole `recipe.yaml`. Only `asdm_recipe`, `base` and `edits` are needed to replay it.

    `refit` says how much of what stays is solved anew after the cut, `distillation` how the student is to be trained,
    or was, `inheritance` which calibrated schedule lies beside the recipe.
    """

    asdm_recipe: Literal[1]
    base: Base
    edits: list[EditEntry]
    refit: Literal["full", "scale", "none"] = "none"
    budget: list[str] = Field(default_factory=list)
    evidence: Evidence | None = None
    distillation: Distillation | None = None
    inheritance: CalibratedInheritance | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    def as_edits(self) -> dict[str, Edit]:
        """Site path to edit."""
        return {entry.site: entry.edit for entry in self.edits}

    @property
    def brings_weights(self) -> bool:
        """Whether a student by it has weights that are none of the teacher's."""
        edits = self.as_edits().values()
        refitted = self.refit != "none" and any(edit != SHARED for edit in edits)
        return refitted or any(map(has_weights, edits))


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    # A wheel holds them inside the package, a source tree beside it.
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(name: str) -> Path:
    """The file of a recipe that is given by its path, by the student's folder, or by the name of a bundled one.

    Raises AsdmError where there is neither.
    """
    path, bundled = Path(name), bundled_recipes()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    if (path / "recipe.yaml").is_file():  # a student's folder
        return path / "recipe.yaml"
    if name in bundled:
        return bundled[name]
    close = difflib.get_close_matches(name, bundled)
    hint = f"Did you mean {close[0]}?" if close else "See `asdm-compress recipes list`, or give a file."
    raise AsdmError(f"there is no recipe {name}", hint)


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises AsdmError with the file and the line for anything that is not right: bad YAML, unknown keys, wrong values, a
    site named twice.
    """
    read = read_checked(path, Recipe, "recipe", "Give the recipe.yaml that `asdm-compress assemble` wrote.")
    recipe = read.content
    seen: dict[str, int] = {}
    for i, entry in enumerate(recipe.edits):
        if entry.site in seen:
            raise AsdmError(f"{read.line('edits', i)}: the site {entry.site} is named twice")
        seen[entry.site] = i
    return recipe


@contextmanager
def telling_lines(path: Path) -> Iterator[None]:
    """What turns out to be wrong with an edit of a recipe is said with the file and the edit's line."""
    try:
        yield
    except SiteError as error:
        read = read_checked(path, Recipe, "recipe", "")
        sites = [entry.site for entry in read.content.edits]
        where = read.line("edits", sites.index(error.site)) if error.site in sites else str(path)
        raise AsdmError(f"{where}: {error.message}", error.hint, error.exit_code) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return as_yaml(content)
