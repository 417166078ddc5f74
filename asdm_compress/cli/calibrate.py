"""`asdm-compress calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import GUIDANCE, STEPS
from asdm_compress.core.files import check_output
from asdm_compress.core.units import parse_budget


def calibrate(
    context: typer.Context,
    model: o.Model = "mini-sd",
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "-b", help="latency=0.5x or latency=2.5s, of a run's sampling loop.")
    ] = None,
    members: Annotated[
        str | None,
        typer.Option(
            help="Students, separated by commas: instead of what is inherited, find which of them or of the model "
            "takes which step. --out is then the switched pipeline."
        ),
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="Instead of a budget: the fastest schedule of at least this mean PSNR in dB.")
    ] = None,
    min_ssim: Annotated[float | None, typer.Option(help="The same for SSIM.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for inheritance.yaml and its report.")] = Path(
        "schedule"
    ),
    steps: o.Steps = STEPS,
    guidance: o.Guidance = GUIDANCE,
    seed: o.Seed = 0,
    scheduler: o.Scheduler = None,
    prompts: o.Prompts = None,
    calibration_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that are measured on; --prompts are split in the proportions of these.")
    ] = 16,
    validation_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts on which schedules are chosen: 32, with --members 16.")
    ] = None,
    test_prompts: Annotated[int, typer.Option(min=1, help="Other prompts, for the report alone.")] = 32,
    images: Annotated[int, typer.Option(min=1, help="Images sampled at once where runs are timed.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images sampled at once everywhere else.")] = 8,
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs.")] = 9,
    corrections: Annotated[
        bool, typer.Option("--corrections/--no-corrections", help="Whether fitted corrections are tried.")
    ] = True,
    curve: Annotated[int, typer.Option(min=0, help="Other times that are tried for the plot of PSNR over time.")] = 3,
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
    """Find which features every sampling step inherits, for a time budget, and try the schedule against its rivals.

    To inherit is to take what an earlier step has computed, or a forecast from several, and to leave out all that only
    led there. The schedule changes no weight: it is for one sampler, number of steps and guidance, and is used by
    `generate --inherit` and `asdm_compress.inheriting`. One goal is needed: --budget, --min-psnr or --min-ssim.
    """
    limits = parse_budget(budget) if budget else ()
    check_output(out, overwrite, None, prompts)
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        load = o.load_options(device, dtype, threads, allow_pickle, prediction_type=prediction_type)
        from asdm_compress.scheduling.goals import goal_of
        from asdm_compress.workflows.calibrate import CalibrateSettings, run_calibrate

    from asdm_compress.evaluation.prompts import read_prompts
    from asdm_compress.reporting.calibration import contestants_table, steps_table
    from asdm_compress.sampling.settings import SamplingSettings

    if validation_prompts is None:
        validation_prompts = 32 if members is None else 16  # the search among members tries every schedule on all
    settings = CalibrateSettings(
        goal_of(limits, min_psnr, min_ssim),
        SamplingSettings(steps, guidance, seed, image_size),
        scheduler,
        None if prompts is None else tuple(read_prompts(prompts)),
        calibration_prompts,
        validation_prompts,
        test_prompts,
        images,
        batch,
        repeats,
        corrections,
        curve,
        o.command_line(),
    )
    if members is not None:
        why, hint = "does nothing with --members", "Leave it out, or calibrate inheritance without --members."
        o.refuse_given(context, ("corrections", "curve"), why, hint)
        from asdm_compress.reporting.switching import entrants_table
        from asdm_compress.workflows.calibrate_members import run_calibrate_members

        names = [name.strip() for name in members.split(",") if name.strip()]
        found = run_calibrate_members([model, *names], out, load, settings, output, overwrite)
        output.show(entrants_table(found.rows()))
        for line in found.lines():
            output.show(line)
        output.show(f"Wrote {out}: a pipeline for generate and for diffusers, with calibration.json and damages.svg.")
        output.result({"out": str(out), **found.content})
        return
    result = run_calibrate(model, out, load, settings, output, overwrite)
    output.show(steps_table(result.calibrated.steps))
    output.show(contestants_table(result.calibrated.rows()))
    for line in result.calibrated.lines(settings.goal):
        output.show(line)
    output.show(
        f"Wrote {out}: inheritance.yaml for generate --inherit, calibration.json, and steps.svg, time_psnr.svg and "
        "inheritance.png to look at."
    )
    output.result({"out": str(out), **result.content})
