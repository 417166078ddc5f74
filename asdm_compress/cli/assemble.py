"""`asdm-compress assemble`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    NEIGHBOURS_SECONDS,
    PROBES,
    STEPS,
)
from asdm_compress.core.edits import parse_shares
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output
from asdm_compress.core.processes import joined
from asdm_compress.core.units import Limit, parse_budget

if TYPE_CHECKING:
    from asdm_compress.workflows.assemble_members import MembersResult

_SHARES = ",".join(map(str, NARROW_SHARES))
_INHERIT_HINT = "For example --inherit latency=0.6x; regular caching such as uniform:3 is for `generate --inherit`."


def assemble(
    context: typer.Context,
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
    inherit: Annotated[
        str | None,
        typer.Option(help="Also calibrate feature inheritance for the student, e.g. latency=0.6x of its own time."),
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Make up to so many students that take turns with the model, one per sampling step, in the budget's "
            "time together; which sizes, and who takes which step, is solved for. For budgets of latency.",
        ),
    ] = None,
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
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts of a routed convolution; 1 is plain ones only. By default 8, or one a band."),
    ] = None,
    routing: Annotated[str, typer.Option(help="What routes the experts: timestep, feature, both, none.")] = "timestep",
    narrow: Annotated[
        str, typer.Option(help="Shares to which inner widths may be narrowed, with commas; or none.")
    ] = _SHARES,
    refit: Annotated[
        str, typer.Option(help="What stays, solved anew after the cut: full (last projections), scale, or none.")
    ] = "full",
    exact: Annotated[
        bool,
        typer.Option(
            "--exact/--no-exact",
            help="Also edits that compute the same in less time (subpixel, shared); no stock UNet has them.",
        ),
    ] = True,
    calibration_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts whose trajectories are measured on.")
    ] = CALIBRATION_PROMPTS,
    held_out_prompts: Annotated[
        int, typer.Option(min=1, help="Other prompts, for the report alone.")
    ] = HELD_OUT_PROMPTS,
    calibration_triples: Annotated[
        int, typer.Option(min=1, help="Moments of these runs that are kept, at least one per prompt.")
    ] = MOMENTS,
    bands: Annotated[int, typer.Option(min=1, help="Timestep bands that damages are measured in.")] = BANDS,
    probes: Annotated[
        int, typer.Option(min=1, help="Runs that say how much each timestep band matters; in fp32.")
    ] = PROBES,
    finest: Annotated[
        str, typer.Option(help="The smallest parts that are cut: sub-unit (attentions, feed-forwards), or unit.")
    ] = "sub-unit",
    neighbours: Annotated[
        float, typer.Option(min=0, help="Seconds in which plans like the best one are tried; 0 for none.")
    ] = NEIGHBOURS_SECONDS,
    profile: Annotated[Path | None, typer.Option(help="A profile.json made here before, instead of a new one.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch of the timed pass; 2 is one image with guidance.")] = 2,
    image_size: o.ImageSize = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Run in channels-last layout.")] = False,
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
    """Cut a model to a budget with the least damage, with a bound, and write the student with its evidence.

    Modules are taken out, narrowed, or replaced by small convolutions, and what stays is solved anew; nothing is
    trained (`distill` does that). The folder opens in diffusers after `import asdm_compress`. Measurements are kept on
    disk, so that another budget takes a part of the time, and a run that was cut off goes on. Under `accelerate launch`
    several processes share the measurements of damages.
    """
    limits = parse_budget(budget or [])
    schedule = _share_of_time(inherit) if inherit else ()
    shares = parse_shares(narrow)
    if members is not None and inherit is not None:
        raise AsdmError("--members and --inherit do not go together", "Use `optimize --members` on the students.")
    if members is not None:
        why = "does nothing with --members"
        o.refuse_given(context, ["neighbours"], why, "Students of several sizes are each searched for once.")
    with joined() as processes:
        check_output(out, overwrite, None, prompts)
        output = Output(quiet or not processes.is_main, as_json and processes.is_main)
        with output.stage("Starting torch"):
            place = processes.device(device)
            load = o.load_options(place, dtype, threads, allow_pickle, prediction_type=prediction_type)
            from asdm_compress.workflows.assemble import Target, run_assemble
            from asdm_compress.workflows.assemble_members import run_assemble_members

        from asdm_compress.assembly.calibration import Effort
        from asdm_compress.evaluation.prompts import read_prompts
        from asdm_compress.profiling.profile import ProfileSettings
        from asdm_compress.reporting.calibration import contestants_table
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
            neighbours_seconds=neighbours,
        )
        target = Target(out, overwrite, o.command_line())
        goal = schedule[0] if schedule else None
        if members is not None:
            _show(run_assemble_members(model, limits, target, load, settings, output, members, processes), output)
            return
        result = run_assemble(model, limits, target, load, settings, output, processes, goal)
    if result is None:
        return
    evidence = result.recipe.evidence
    assert evidence is not None
    output.show(plan_tree(result.plan))
    output.show(evidence_table(evidence))
    for name, value, meaning in result.quality.rows():
        output.show(f"{name}: {value} ({meaning})")
    output.show(result.proof)
    if result.inheritance is not None:
        output.show(contestants_table(result.inheritance.rows()))
        output.show(result.inheritance.verdict)
    output.show(f"Wrote {out}: the student, its recipe.yaml and measurements, and report.html to open in a browser.")
    output.result(
        {
            "out": str(out),
            "stock": result.is_stock,
            "quality": result.quality.as_json(),
            "recipe": result.recipe.model_dump(mode="json"),
            "schedule_refused": None if result.refused is None else str(result.refused),
        }
    )
    if result.refused is not None:
        if as_json:
            raise typer.Exit(int(result.refused.exit_code))
        raise result.refused


def _share_of_time(said: str) -> tuple[Limit, ...]:
    """The time that a student's own schedule is calibrated to."""
    try:
        limits = parse_budget([said])
    except AsdmError as error:
        raise AsdmError(f"--inherit takes a share of the student's time, not {said!r}", _INHERIT_HINT) from error
    if len(limits) != 1 or limits[0].resource != "latency":
        raise AsdmError(f"schedules are calibrated for time alone, not for {said!r}", _INHERIT_HINT)
    return limits


def _show(made: MembersResult | None, output: Output) -> None:
    """What `--members` has made; nothing in a process that only helped to measure."""
    if made is None:
        return
    from asdm_compress.reporting.switching import entrants_table

    output.show(entrants_table(made.found.rows()))
    for line in made.lines():
        output.show(line)
    output.show(f"Wrote {made.out}: the switched pipeline, its members' recipes and members.json.")
    output.result({"out": str(made.out), "lineup": made.students.lineup.as_json(), **made.found.content})
