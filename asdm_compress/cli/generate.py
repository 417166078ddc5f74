"""`asdm-compress generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import GUIDANCE, STEPS
from asdm_compress.core.files import check_output


def generate(
    model: Annotated[
        str, typer.Argument(help="mini-sd, a diffusers folder, a .safetensors or .ckpt file, a name or a hub id.")
    ],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts; each makes its images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files and the grid.")] = Path("images"),
    compare: Annotated[str | None, typer.Option(help="A teacher to sample beside it, at the same seeds.")] = None,
    inherit: Annotated[
        str | None,
        typer.Option(
            help="Inherit features: an inheritance.yaml, a mode such as uniform:3, or `calibrated` for the schedule in "
            "the model's folder."
        ),
    ] = None,
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Images per prompt, with successive seeds.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images sampled at once.")] = 8,
    seed: o.Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help=f"Sampling steps; by default those that the model was made for, else {STEPS}."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance scale, 1 switches guidance off; by default that which the model was made "
            f"for, else {GUIDANCE:g}."
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from, in place of the empty prompt; for all images.")
    ] = None,
    scheduler: o.Scheduler = None,
    image_size: o.ImageSize = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    threads: o.Threads = None,
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Make images, with a labelled grid and the seconds per image."""
    check_output(out, overwrite, None, None if inherit is None else Path(inherit))
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        load = o.load_options(device, dtype, threads, allow_pickle, prediction_type=prediction_type)
        from asdm_compress.workflows.generate import GenerateSettings, run_generate

    from asdm_compress.sampling.settings import SamplingSettings

    sampling = SamplingSettings(
        STEPS if steps is None else steps, GUIDANCE if guidance is None else guidance, seed, image_size
    )
    settings = GenerateSettings(
        sampling, tuple(prompt), images, scheduler, compare, inherit, own_steps=steps is None and scheduler is None,
        own_guidance=guidance is None, own_size=image_size is None,
        negative_prompt=negative_prompt, batch=batch,
    )  # fmt: skip
    result = run_generate(model, out, load, settings, output, overwrite)
    for line in result.lines():
        output.show(line)
    output.show(f"Wrote {len(result.files)} files to {out}; grid.png shows them all.")
    output.result(result.as_json())
