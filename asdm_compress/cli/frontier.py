"""`asdm-compress frontier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import (
    BANDS,
    CALIBRATION_PROMPTS,
    GUIDANCE,
    HELD_OUT_PROMPTS,
    MOMENTS,
    NARROW_SHARES,
    PROBES,
    STEPS,
)
from asdm_compress.core.edits import parse_shares
from asdm_compress.core.files import check_output
from asdm_compress.core.units import parse_budget

# What is asked of a folder that `assemble` wrote.
_OF_A_FOLDER = {"model", "resource", "budgets", "also", "pairs", "patience", "images", "out", "overwrite", "quiet",
                "as_json"}  # fmt: skip
_SHARES = ",".join(map(str, NARROW_SHARES))


def frontier(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]", help="A folder that assemble wrote, which needs no measurement; or a model, as anywhere."
        ),
    ] = "mini-sd",
    resource: Annotated[str, typer.Option(help="What the budgets are of: latency, macs or params.")] = "latency",
    budgets: Annotated[
        str | None, typer.Option(help="Shares of the teacher's, such as 0.9x,0.8x,0.7x; by default 0.95x to 0.25x.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option("--also", help="Limits that hold for every point, such as params=0.6x.")
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Minimise what pairs of edits add too, which is seldom proven in time."),
    ] = False,
    patience: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds that one solve for a budget may take; with --pairs there are several."),
    ] = 10.0,
    images: Annotated[
        int, typer.Option(min=0, help="Build, fit and measure every plan, and show so many images of each.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for frontier.json and frontier.svg; by default MODEL's.")
    ] = None,
    steps: o.Steps = STEPS,
    guidance: o.Guidance = GUIDANCE,
    seed: o.Seed = 0,
    scheduler: o.Scheduler = None,
    prompts: o.Prompts = None,
    slot: Annotated[str, typer.Option(help="As of assemble: auto, all, 1x1, 3x3, separable, none.")] = "auto",
    experts: Annotated[int | None, typer.Option(min=1, help="As of assemble.")] = None,
    routing: Annotated[str, typer.Option(help="As of assemble: timestep, feature, both, none.")] = "timestep",
    narrow: Annotated[str, typer.Option(help="As of assemble.")] = _SHARES,
    refit: Annotated[str, typer.Option(help="As of assemble: full, scale, none.")] = "full",
    exact: Annotated[bool, typer.Option("--exact/--no-exact", help="As of assemble.")] = True,
    calibration_prompts: Annotated[int, typer.Option(min=1, help="As of assemble.")] = CALIBRATION_PROMPTS,
    calibration_triples: Annotated[int, typer.Option(min=1, help="As of assemble.")] = MOMENTS,
    bands: Annotated[int, typer.Option(min=1, help="As of assemble.")] = BANDS,
    probes: Annotated[int, typer.Option(min=1, help="As of assemble.")] = PROBES,
    finest: Annotated[str, typer.Option(help="As of assemble: sub-unit or unit.")] = "sub-unit",
    profile: Annotated[Path | None, typer.Option(help="A profile.json made here before, instead of a new one.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed passes.")] = 15,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    measure_dtype: o.MeasureDtype = "auto",
    threads: o.Threads = None,
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """For every budget the plan of least summed damage, with a bound: the frontier as a table, JSON and a plot.

    A folder that `assemble` wrote has everything that this needs. For a model, damages that `assemble` has measured
    with the same settings are not measured again.
    """
    output = Output(quiet, as_json)
    limits = parse_budget(also) if also else ()
    shares = parse_shares(narrow)
    with output.stage("Starting torch"):
        from asdm_compress.assembly.calibration import Effort
        from asdm_compress.evaluation.prompts import read_prompts
        from asdm_compress.profiling.profile import ProfileSettings
        from asdm_compress.reporting.tables import frontier_table
        from asdm_compress.sampling.settings import SamplingSettings
        from asdm_compress.workflows.frontier import Wanted, ask, is_assembly, of_folder, of_model
        from asdm_compress.workflows.plan import PlanSettings

    question = ask(resource, budgets, limits, pairs, patience)
    wanted = Wanted(question, o.command_line(), images)
    if is_assembly(model):
        why = "does nothing here: everything about this student is measured"
        hint = "Give the model that it was made of, or leave the option out."
        o.refuse_given(context, sorted(set(context.params) - _OF_A_FOLDER), why, hint)
        place = Path(model) if out is None else out
        found = of_folder(Path(model), place, wanted, output, overwrite)
    else:
        place = Path("frontier") if out is None else out
        check_output(place, overwrite, None, prompts, profile)
        load = o.load_options(device, dtype, threads, allow_pickle, prediction_type=prediction_type)
        settings = PlanSettings(
            ProfileSettings(repeats=repeats),
            SamplingSettings(steps, guidance, seed),
            scheduler=scheduler,
            prompts=None if prompts is None else tuple(read_prompts(prompts)),
            calibration_prompts=calibration_prompts,
            held_out_prompts=max(HELD_OUT_PROMPTS, images),
            bands=bands,
            effort=Effort(calibration_triples, probes),
            known_profile=profile,
            slot=slot,  # type: ignore[arg-type]
            experts=experts,
            routing=routing,  # type: ignore[arg-type]
            narrow=shares,
            finest=finest,  # type: ignore[arg-type]
            refit=refit,  # type: ignore[arg-type]
            exact=exact,
            measure_dtype=o.measure_dtype(measure_dtype),
        )
        found = of_model(model, place, load, settings, wanted, output, overwrite)
    output.show(frontier_table(found))
    output.show(f"Wrote {place}: frontier.json and frontier.svg; `asdm-compress report` shows them.")
    output.result({"out": str(place), **found.model_dump(mode="json")})
