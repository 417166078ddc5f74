"""`asdm-compress switch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import STEPS
from asdm_compress.core.files import check_output


def switch(
    context: typer.Context,
    models: Annotated[
        list[str], typer.Argument(help="A teacher, which is a whole pipeline, and one or more of its students.")
    ],
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            "-s",
            help="small-first:10, large-first:10, interleaved:3, explicit:teacher*6/student*16/skip/student/teacher "
            "(one for every step), or the file that `calibrate --members` wrote. Members have the names of their "
            "folders.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the switched pipeline.")] = Path("switched"),
    steps: o.Steps = STEPS,
    scheduler: o.Scheduler = None,
    device: o.Device = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto keeps the teacher's own.")] = "auto",
    threads: o.Threads = None,
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Make one model of a teacher and its students, and say which of them takes which sampling step."""
    if Path(schedule).suffix in (".yaml", ".yml"):
        o.refuse_given(context, ("steps",), "does nothing with a schedule's file", "It names an action for every step.")
    check_output(out, overwrite, None, Path(schedule))
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        from dataclasses import replace

        precision = "fp32" if dtype == "auto" else dtype
        load = o.load_options(device, precision, threads, allow_pickle, prediction_type=prediction_type)
        load = replace(load, dtype=None) if dtype == "auto" else load
        from asdm_compress.workflows.switch import SwitchSettings, run_switch

    result = run_switch(models, out, load, SwitchSettings(schedule, steps, scheduler), output, overwrite)
    for line in result.lines():
        output.show(line)
    output.show(f"Wrote {out}; `generate {out} …` samples with it, and so does diffusers after `import asdm_compress`.")
    output.result(result.as_json())
