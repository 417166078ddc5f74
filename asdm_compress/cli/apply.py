"""`asdm-compress apply`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.files import check_output
from asdm_compress.core.recipe import load_recipe


def apply(
    recipe: Annotated[Path, typer.Argument(help="The recipe.yaml of an assembled model.")],
    model: o.Model = "mini-sd",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the student.")] = Path("out"),
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto keeps the checkpoint's own.")] = "auto",
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Replay a recipe on a checkpoint of the same family, without a search."""
    content = load_recipe(recipe)
    check_output(out, overwrite)
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        load = o.load_options("cpu", "fp32" if dtype == "auto" else dtype, None, allow_pickle)
        load = replace(load, dtype=None) if dtype == "auto" else load
        from asdm_compress.workflows.apply import run_apply

    result = run_apply(content, model, out, load, output, overwrite)
    output.show(
        f"Wrote {out}: {result.kept} tensors inherited, {result.removed} removed; "
        f"{'opens in plain diffusers' if result.is_stock else 'opens after `import asdm_compress`'}."
    )
    output.result(
        {"out": str(out), "stock": result.is_stock, "kept_tensors": result.kept, "removed_tensors": result.removed}
    )
