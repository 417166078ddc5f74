"""`asdm-compress recipes`: the recipes that ship, and a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.recipe import find_recipe
from asdm_compress.core.units import format_count

if TYPE_CHECKING:
    from asdm_compress.workflows.recipes import Description

recipes = typer.Typer(name="recipes", help="List, show, check and compare recipes.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A recipe.yaml, or the name of a bundled recipe.")]


@recipes.command("list")
def list_recipes(quiet: o.Quiet = False, as_json: o.Json = False) -> None:
    """The bundled recipes: what each is for, and what it leaves."""
    output = Output(quiet, as_json)
    with output.bar("Building every student without weights") as bar:
        from asdm_compress.workflows.recipes import describe_all

        found = describe_all(bar)
    table = Table()
    for title in ("recipe", "for", "edits", "parameters", "MACs"):
        table.add_column(title, justify="left" if title in ("recipe", "for") else "right")
    for one in found:
        table.add_row(one.name, _meant_for(one), str(len(one.recipe.edits)), *_left(one))
    output.show(table)
    output.result({"recipes": [one.as_json() for one in found]})


@recipes.command()
def show(recipe: Name, quiet: o.Quiet = False, as_json: o.Json = False) -> None:
    """Which parts a recipe takes out, with a drawing of the UNet; no checkpoint is needed."""
    output, one = _described(recipe, quiet, as_json)
    table = Table(title=f"{one.name}, for {_meant_for(one)}", title_justify="left")
    for title in ("site", "where", "edit", "parameters removed", "MACs removed"):
        table.add_column(title, justify="right" if title.endswith("removed") else "left")
    for entry in one.recipe.edits:
        site = entry.site
        saved = f"{one.removed_macs[site] / one.teacher_macs:.1%}"
        table.add_row(site, one.where[site], entry.edit, f"{one.removed[site]:,}", saved)
    if one.sources:
        output.show(one.sources + "\n")
    output.show(table)
    output.show(one.drawing + "\n")
    parameters, macs = _left(one)
    opens = "opens in plain diffusers" if one.is_stock else "opens after `import asdm_compress`"
    output.show(f"{parameters} parameters and {macs} MACs at {one.image_size} px are left; the student {opens}.")
    output.result({**one.as_json(), "drawing": one.drawing})


@recipes.command()
def check(recipe: Name, quiet: o.Quiet = False, as_json: o.Json = False) -> None:
    """Read a recipe and build its student without weights; every error names its line."""
    output, one = _described(recipe, quiet, as_json)
    output.show(f"{one.name} is right: {len(one.recipe.edits)} edits, {one.parameters:,} parameters left.")
    output.result(one.as_json())


@recipes.command()
def diff(first: Name, second: Name, quiet: o.Quiet = False, as_json: o.Json = False) -> None:
    """Where two recipes make different students."""
    output = Output(quiet, as_json)
    paths = find_recipe(first), find_recipe(second)
    with output.stage("Comparing"):
        from asdm_compress.workflows.recipes import compare

        rows = compare(*paths)
    table = Table()
    for title in ("", _stem(first), _stem(second)):
        table.add_column(title)
    for row in rows:
        table.add_row(row.what, row.first, row.second)
    output.show(table if rows else "They make the same student.")
    output.result({"differences": [{"what": r.what, "first": r.first, "second": r.second} for r in rows]})


def _described(recipe: str, quiet: bool, as_json: bool) -> tuple[Output, Description]:
    output = Output(quiet, as_json)
    path = find_recipe(recipe)
    with output.stage("Reading"):
        from asdm_compress.workflows.recipes import describe

        return output, describe(path)


def _meant_for(one: Description) -> str:
    # The published variants differ in the channels that the first convolution takes.
    is_open = "in_channels" not in one.recipe.base.architecture
    return f"{one.recipe.base.model}{', inpainting, depth' if is_open else ''}"


def _left(one: Description) -> tuple[str, str]:
    return (
        f"{format_count(one.parameters)} ({one.parameters / one.teacher_parameters:.0%})",
        f"{format_count(one.macs)} ({one.macs / one.teacher_macs:.0%})",
    )


def _stem(name: str) -> str:
    """A bundled recipe's name as it is; of a file its name, with its folder's where that says more."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return name
    return f"{path.parent.name}/{path.name}" if path.name == "recipe.yaml" and path.parent.name else path.stem
