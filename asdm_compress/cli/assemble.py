"""`asdm-compress assemble`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import CALIBRATION_PROMPTS, GUIDANCE, HELD_OUT_PROMPTS, NARROW_SHARES, STEPS
from asdm_compress.core.edits import parse_shares
from asdm_compress.core.files import check_output
from asdm_compress.core.units import parse_budget

_SHARES = ",".join(map(str, NARROW_SHARES))


def assemble(
    model: o.Model = "mini-sd",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", "-b", help="latency=0.7x, latency=180ms, macs=280G, params=450M; several with commas."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the student, its recipe and its report.")] = Path(
        "out"
    ),
    steps: o.Steps = STEPS,
    guidance: o.Guidance = GUIDANCE,
    seed: o.Seed = 0,
    scheduler: o.Scheduler = None,
    prompts: o.Prompts = None,
    slot: Annotated[
        str,
        typer.Option(
            help="Convolutions for the places of what is taken out: auto (1x1 and 3x3), all, 1x1, 3x3, separable, none."
        ),
    ] = "auto",
    experts: Annotated[int, typer.Option(min=1, help="Experts of a routed convolution; 1 for plain ones only.")] = 8,
    routing: Annotated[str, typer.Option(help="What routes the experts: timestep, feature, both, none.")] = "timestep",
    narrow: Annotated[
        str, typer.Option(help="Shares to which inner widths may be narrowed, with commas; or none.")
    ] = _SHARES,
    refit: Annotated[
        str, typer.Option(help="What stays, solved anew after the cut: full (last projections), scale, or none.")
    ] = "full",
    calibration_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts whose trajectories are measured on.")
    ] = CALIBRATION_PROMPTS,
    held_out_prompts: Annotated[
        int, typer.Option(min=1, help="Other prompts, for the report alone.")
    ] = HELD_OUT_PROMPTS,
    profile: Annotated[Path | None, typer.Option(help="A profile.json made here before, instead of a new one.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch of the timed pass; 2 is one image with guidance.")] = 2,
    image_size: o.ImageSize = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Time in channels-last layout.")] = False,
    repeats: Annotated[int, typer.Option(min=2, help="Timed passes.")] = 15,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    threads: o.Threads = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Cut a model to a budget with the least damage, provably, and write the student with its evidence."""
    limits = parse_budget(budget or [])
    shares = parse_shares(narrow)
    check_output(out, overwrite)
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        load = o.load_options(device, dtype, threads, allow_pickle)
        from asdm_compress.workflows.assemble import run_assemble

    from asdm_compress.evaluation.prompts import read_prompts
    from asdm_compress.profiling.profile import ProfileSettings
    from asdm_compress.reporting.tables import evidence_table, plan_tree
    from asdm_compress.sampling.settings import SamplingSettings
    from asdm_compress.workflows.plan import PlanSettings

    settings = PlanSettings(
        ProfileSettings(image_size, batch, None, channels_last, repeats),
        SamplingSettings(steps, guidance, seed, image_size),
        scheduler=scheduler,
        prompts=None if prompts is None else tuple(read_prompts(prompts)),
        calibration_prompts=calibration_prompts,
        held_out_prompts=held_out_prompts,
        known_profile=profile,
        slot=slot,  # type: ignore[arg-type]
        experts=experts,
        routing=routing,  # type: ignore[arg-type]
        narrow=shares,
        refit=refit,  # type: ignore[arg-type]
    )
    result = run_assemble(model, limits, out, load, settings, output, overwrite)
    evidence = result.recipe.evidence
    assert evidence is not None
    output.show(plan_tree(result.plan))
    output.show(evidence_table(evidence))
    for name, value, meaning in result.quality.rows():
        output.show(f"{name}: {value} ({meaning})")
    output.show(result.proof)
    output.show(f"Wrote {out}: the student, recipe.yaml, profile.json, grid.png, and report.html to open in a browser.")
    output.result(
        {
            "out": str(out),
            "stock": result.is_stock,
            "quality": result.quality.as_json(),
            "recipe": result.recipe.model_dump(mode="json"),
        }
    )
