"""The recipe: a plan as a file that people read, edit, compare, and replay on other checkpoints."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from asdm_compress.core.edits import EDIT_GRAMMAR, Edit, conv_spec
from asdm_compress.core.errors import AsdmError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Strict):
    """What the recipe was made for. A checkpoint with another architecture is refused."""

    model: str
    architecture: dict[str, Any]


class EditEntry(_Strict):
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


class Costs(_Strict):
    """Costs of one UNet; seconds hold for the machine and settings in `profile.json` only."""

    latency: float = Field(gt=0)
    macs: int = Field(gt=0)
    params: int = Field(gt=0)


class Evidence(_Strict):
    """What the search predicted and what was then measured, beside the teacher's own costs.

    Damages are weighted relative squared errors of the noise prediction; `held_out` ones are from prompts and seeds
    that the search has not seen. `summed` is what the search minimised and `damage_bound` bounds, `predicted` that
    times what the other plans searched were off by. `solved_for` is what the proof of optimality holds for: the budget
    itself, or a tighter one where a first plan measured slower than predicted.
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


class Recipe(_Strict):
    """A whole `recipe.yaml`. Only `asdm_recipe`, `base` and `edits` are needed to replay it.

    `refit` says how much of what stays is solved anew after the cut.
    """

    asdm_recipe: Literal[1]
    base: Base
    edits: list[EditEntry]
    refit: Literal["full", "scale", "none"] = "none"
    budget: list[str] = []
    evidence: Evidence | None = None
    provenance: dict[str, Any] = {}

    def as_edits(self) -> dict[str, Edit]:
        """Site path to edit."""
        return {entry.site: entry.edit for entry in self.edits}


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    # A wheel holds them inside the package, a source tree beside it.
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(name: str) -> Path:
    """The file of a recipe that is given by its path or by the name of a bundled one.

    Raises AsdmError where there is neither.
    """
    path, bundled = Path(name), bundled_recipes()
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
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
    if not path.is_file():
        raise AsdmError(f"there is no recipe {path}", "Give the recipe.yaml that `asdm-compress assemble` wrote.")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise AsdmError(f"{path} is not UTF-8 text", "A recipe is a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else str(path)
        raise AsdmError(f"{line}: no valid YAML: {getattr(error, 'problem', error)}") from error
    _refuse_duplicates(node, path)
    if not isinstance(content, Mapping):
        raise AsdmError(f"{path}:1: a recipe is a mapping with the keys asdm_recipe, base and edits")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        # A misspelt key is both unknown and missing; the first says more.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        line_number = _line_of(node, first["loc"])
        where = ".".join(str(part) for part in first["loc"])
        raise AsdmError(f"{path}:{line_number}: {where}: {_explain(first)}", _hint(first)) from error
    seen: dict[str, int] = {}
    for i, entry in enumerate(recipe.edits):
        if entry.site in seen:
            raise AsdmError(f"{path}:{_line_of(node, ('edits', i))}: the site {entry.site} is named twice")
        seen[entry.site] = i
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)


def _refuse_duplicates(node: yaml.Node | None, path: Path) -> None:
    """YAML readers let a second key win silently."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise AsdmError(f"{path}:{key.start_mark.line + 1}: the key {key.value} is there twice")
            seen.add(key.value)
            _refuse_duplicates(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value, path)


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    return str(error["msg"]).removeprefix("Input should be ").replace("Field required", "this key is missing")


def _hint(error: Any) -> str | None:
    if error["type"] == "extra_forbidden":
        return "Check the spelling; unknown keys are refused, so that none is silently ignored."
    return None


def _line_of(node: yaml.Node | None, location: Sequence[int | str]) -> int:
    """The line (from 1) of the deepest part of `location` that the file has."""
    line = 1
    for part in location:
        if node is None:
            return line
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line
