"""`asdm-compress profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.errors import AsdmError

DEPTHS = ("block", "layer", "unit", "sub-unit")


def profile(
    model: o.Model = "mini-sd",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for profile.json and profile.svg; by default nothing is written."),
    ] = None,
    depth: Annotated[str, typer.Option(help="block, layer, unit or sub-unit: how deep the table goes.")] = "unit",
    batch: Annotated[int, typer.Option(min=1, help="Samples per pass; 2 is one image with guidance.")] = 2,
    image_size: o.ImageSize = None,
    text_tokens: Annotated[int | None, typer.Option(min=1, help="Text tokens, by default the model's own.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Profile in channels-last layout.")] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed passes, fewer where they take long; medians are shown, all samples kept.")
    ] = 10,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Add what fvcore and thop count, and why it differs.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build a named model at full size without its weights.")
    ] = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    threads: o.Threads = None,
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Measure what every block, layer, unit and sub-unit of a UNet costs."""
    if depth not in DEPTHS:
        raise AsdmError(f"unknown depth {depth!r}", f"Use {', '.join(DEPTHS)}.")
    output = Output(quiet, as_json)
    from asdm_compress.core.files import check_output

    if out is not None:
        check_output(out, overwrite)
    with output.stage("Starting torch"):
        load = o.load_options(device, dtype, threads, allow_pickle, random_weights, prediction_type)
        from asdm_compress.workflows.profile import run_profile

    from asdm_compress.profiling.profile import ProfileSettings
    from asdm_compress.reporting.tables import profile_table

    settings = ProfileSettings(image_size, batch, text_tokens, channels_last, repeats, cross_check)
    found = run_profile(model, load, settings, output, out, overwrite)
    output.show(profile_table(found, depth))
    if out is not None:
        output.show(f"Wrote {out / 'profile.json'} and {out / 'profile.svg'}")
    output.result(found.model_dump(mode="json"))
