"""`asdm-compress export`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import STEPS
from asdm_compress.core.files import check_output
from asdm_compress.core.units import format_bytes

_OTHERS = ("ldm", "sdcpp", "onnx", "portable")


def export(
    context: typer.Context,
    model: o.Model = "mini-sd",
    form: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="ldm or sdcpp (one file for other programs), onnx, portable, static or per-step (experts).",
        ),
    ] = "ldm",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file, or the folder; by default model.safetensors, or model-FORMAT."),
    ] = None,
    steps: o.Steps = STEPS,
    scheduler: o.Scheduler = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto keeps the model's own.")] = "auto",
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Write a model in the layout that another program reads."""
    if form in _OTHERS:
        why = f"does nothing with --format {form}"
        o.refuse_given(context, ("steps", "scheduler"), why, "It is for static and per-step.")
    if out is not None:
        check_output(out, overwrite)
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        load = o.load_options(
            "cpu", "fp32" if dtype == "auto" else dtype, None, allow_pickle, prediction_type=prediction_type
        )
        from asdm_compress.workflows.export import default_out, run_export

    out = out or default_out(form)
    load = replace(load, dtype=None) if dtype == "auto" else load
    result = run_export(model, out, form, load, steps, scheduler, output, overwrite)
    output.show(f"Wrote {result.out}: {result.tensors} tensors, {format_bytes(result.bytes)}.")
    if result.difference is not None:
        output.show(f"ONNX Runtime's predictions differ from torch's by {result.difference:.2g} at most.")
    for program in result.programs:
        how = "opens" if program.opens else "does not open"
        output.show(f"{program.program} {how} it{': ' + program.why if program.why else ''}.")
    found: dict[str, object] = {
        "out": str(result.out),
        "format": form,
        "tensors": result.tensors,
        "bytes": result.bytes,
    }
    if result.difference is not None:
        found["difference"] = result.difference
    output.result({**found, "programs": [asdict(program) for program in result.programs]})
