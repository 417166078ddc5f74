"""`asdm-compress export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import STEPS
from asdm_compress.core.files import check_output
from asdm_compress.core.units import format_bytes


def export(
    model: o.Model = "mini-sd",
    form: Annotated[
        str, typer.Option("--format", "-f", help="ldm (one file for other programs), static or per-step (experts).")
    ] = "ldm",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file, or for static and per-step the folder.")] = Path(
        "model.safetensors"
    ),
    steps: o.Steps = STEPS,
    scheduler: o.Scheduler = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto keeps the model's own.")] = "auto",
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Write a model in the layout that another program reads."""
    check_output(out, overwrite)
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        load = o.load_options("cpu", "fp32" if dtype == "auto" else dtype, None, allow_pickle)
        from asdm_compress.workflows.export import run_export

    load = replace(load, dtype=None) if dtype == "auto" else load
    result = run_export(model, out, form, load, steps, scheduler, output, overwrite)
    output.show(f"Wrote {result.out}: {result.tensors} tensors, {format_bytes(result.bytes)}.")
    output.result({"out": str(result.out), "format": form, "tensors": result.tensors, "bytes": result.bytes})
