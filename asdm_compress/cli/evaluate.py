"""`asdm-compress evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.files import check_output
from asdm_compress.core.processes import joined


def evaluate(
    model: Annotated[str, typer.Argument(help="A student's folder, a UNet's folder, or any other model.")],
    against: Annotated[str | None, typer.Option(help="Its teacher; by default what a student's recipe names.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for eval.json, protocol.md and images.")] = Path(
        "evaluation"
    ),
    inherit: Annotated[
        str | None,
        typer.Option(
            help="The model inherits features: an inheritance.yaml, a mode such as uniform:3, or `calibrated` for the "
            "schedule in its folder."
        ),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="own, or bk-sdm: 30 000 COCO captions, PNDM, 25 steps, 512 to 256 pixels, seed 1234.")
    ] = "own",
    images: Annotated[int | None, typer.Option("--images", "-n", min=2, help="Image pairs; own: 60.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Captions: lines (.txt), a table (.csv, .tsv, .jsonl), or COCO's (.json).")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Real images for FID, KID, CMMD: a folder, or pytorch-fid's statistics (.npz).")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights (torch-fidelity's or pytorch-fid's file), for FID, KID, IS.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model, for CLIP scores.")] = None,
    cmmd: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model, for CMMD; published with ViT-L/14 at 336 pixels.")
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="torchvision's AlexNet or VGG16 weights, for LPIPS.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps; own: 25.")] = None,
    model_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Steps of the model where they are not the teacher's; by default what it was made for, if it says so.",
        ),
    ] = None,
    model_scheduler: Annotated[
        str | None, typer.Option(help="Sampler of the model where it is not the teacher's: ddim, dpm++, euler, …")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; own: 5.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**62, help="Seed of the first pair; each has the next.")
    ] = None,
    scheduler: o.Scheduler = None,
    image_size: o.ImageSize = None,
    resize: Annotated[
        int | None, typer.Option(min=16, help="Pixels per side at which Inception and CLIP measure, bicubic.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Turns in which both models are timed; 0 leaves it out.")] = 7,
    batch: Annotated[int, typer.Option(min=1, help="Pairs sampled at once, and kept together.")] = 8,
    keep_images: Annotated[int, typer.Option(min=0, help="Pairs that are kept as PNG files.")] = 16,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    threads: o.Threads = None,
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Measure a model beside its teacher: fidelity, quality, speed, memory, each figure with its interval.

    What is done of it is kept in OUT.run, so that the same command goes on after an interruption. Under `accelerate
    launch` several processes share the images.
    """
    with joined() as processes:
        check_output(out, overwrite, None, prompts, None if inherit is None else Path(inherit))
        output = Output(quiet or not processes.is_main, as_json and processes.is_main)
        with output.stage("Starting torch"):
            place = processes.device(device)
            load = o.load_options(place, dtype, threads, allow_pickle, prediction_type=prediction_type)
            from asdm_compress.workflows.evaluate import run_evaluate

        from asdm_compress.evaluation.instruments import Weights
        from asdm_compress.reporting.measures import measure_tables
        from asdm_compress.workflows.evaluation_input import EvaluateSettings

        changes = {
            "images": images,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "sampler": scheduler,
            "image_size": image_size,
            "view_size": resize,
        }
        settings = EvaluateSettings(
            against,
            inherit,
            protocol,
            changes,
            prompts,
            reference,
            Weights(inception, clip, cmmd, lpips),
            repeats,
            batch,
            keep_images,
            o.command_line(),
            model_steps,
            model_scheduler,
        )
        result = run_evaluate(model, out, load, settings, output, overwrite, processes)
    if result is None:
        return
    for table in measure_tables(result):
        output.show(table)
    output.show(
        f"Wrote {out}: eval.json, protocol.md, and {sum(p.model_image is not None for p in result.pairs)} pairs."
    )
    output.result(result.model_dump(mode="json"))
