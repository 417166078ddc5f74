"""`asdm-compress optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import GUIDANCE, STEPS
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output
from asdm_compress.core.units import parse_budget


def optimize(
    model: o.Model = "mini-sd",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", "-b", help="latency=0.33x, or seconds per image such as latency=2.5s, decoding included."
        ),
    ] = None,
    members: Annotated[
        str | None, typer.Option(help="Students, separated by commas, that steps may be given to.")
    ] = None,
    students: Annotated[
        int,
        typer.Option(
            min=0,
            help="Make up to so many students first, as `assemble --members` does by default, where none are given. At "
            "full size make them with `assemble`, whose options say how much is measured, and give them as --members.",
        ),
    ] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pipeline and its report.")] = Path("fast"),
    steps: Annotated[
        int, typer.Option(min=2, max=1000, help="Steps of the full run that pictures are compared with.")
    ] = STEPS,
    guidance: o.Guidance = GUIDANCE,
    seed: o.Seed = 0,
    scheduler: o.Scheduler = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="`fidelity`: how near pictures are to the full run's; `quality`: how much of their prompts they show, "
            "and how like the full run's they are as a set, for the bundled world's reader or for --clip."
        ),
    ] = "fidelity",
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model, which judges quality.")] = None,
    prompts: o.Prompts = None,
    calibration_prompts: Annotated[int, typer.Option(min=1, help="Prompts that are measured on.")] = 8,
    validation_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts on which is chosen: 16, or 128 where quality counts.")
    ] = None,
    test_prompts: Annotated[
        int | None, typer.Option(min=1, help="Other prompts, for the report alone: 32, or 128 where quality counts.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images sampled at once where runs are timed.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images sampled at once everywhere else.")] = 8,
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs.")] = 9,
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
    """Spend a budget of time for a whole image where it costs least: steps, sampler, members, inheritance, guidance."""
    if not budget:
        raise AsdmError("optimize takes a budget of time", "Use --budget latency=0.33x.")
    if members and students:
        raise AsdmError("--members are given, and --students are to be made", "Use one of the two.")
    names = [name.strip() for name in (members or "").split(",") if name.strip()]
    if members is not None and not names:
        raise AsdmError("--members names none", "Give students' folders, separated by commas.")
    limits = parse_budget(budget)
    check_output(out, overwrite, None, prompts, clip)
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        load = o.load_options(device, dtype, threads, allow_pickle, prediction_type=prediction_type)
        from asdm_compress.scheduling.goals import goal_of
        from asdm_compress.workflows.calibrate import CalibrateSettings

    from asdm_compress.evaluation.prompts import read_prompts
    from asdm_compress.profiling.profile import ProfileSettings
    from asdm_compress.reporting.frontier import tried_table
    from asdm_compress.sampling.settings import SamplingSettings
    from asdm_compress.workflows.candidates import Criterion
    from asdm_compress.workflows.optimize import Make, run_optimize
    from asdm_compress.workflows.plan import PlanSettings

    counts = Criterion(criterion, clip)
    own = None if prompts is None else tuple(read_prompts(prompts))
    measured, chosen, reported = counts.prompts(calibration_prompts, len(set(own)) if own else None)
    settings = CalibrateSettings(
        goal_of(limits, None, None),
        SamplingSettings(steps, guidance, seed, image_size),
        scheduler,
        own,
        measured,
        validation_prompts or chosen,
        test_prompts or reported,
        images,
        batch,
        repeats,
        command=o.command_line(),
    )
    make = Make(students, PlanSettings(ProfileSettings(image_size))) if students else None
    found = run_optimize([model, *names], out, load, settings, output, overwrite, make, counts)
    if found.students is not None:
        output.show(found.students.line())
    best = found.best
    output.show(tried_table(found.rows(), found.what))
    output.show(
        f"Best within the budget: {best.way.name}. Wrote {out}; sample with `generate {out} …`, which takes the "
        f"{best.way.steps} steps that it is made for, or, after `import asdm_compress`, by diffusers with "
        f"`num_inference_steps={best.way.steps}`."
    )
    reference = found.content["reference"]
    if "test_worth" in reference:
        own = reference["test_worth"]
        output.show(
            f"The full run's own on test prompts: {own['shown']:.3f}; {own['distance']:.3g} from its pictures of other "
            "seeds, as all distances are."
        )
    decoding = reference["decoding"] / (best.share * reference["seconds"])
    output.show(f"The VAE's decoder, which is left as it is, takes {decoding:.0%} of that way's time.")
    if (out / "frontier").is_dir():
        output.show(f"The rest of the frontier is in {out}/frontier, a folder each; optimize.json has their steps.")
    output.result({"out": str(out), **found.content})
