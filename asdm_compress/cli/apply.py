"""`asdm-compress apply`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.defaults import BANDS, CALIBRATION_PROMPTS, GUIDANCE, MOMENTS, STEPS
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output
from asdm_compress.core.recipe import Recipe, find_recipe, load_recipe, telling_lines
from asdm_compress.core.units import parse_bytes

# What only a recipe takes that brings weights of its own along.
_FITTED = (
    "slot_start", "prompts", "calibration_prompts", "calibration_triples", "bands", "steps", "guidance", "seed",
    "scheduler",
)  # fmt: skip


def apply(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe.yaml of an assembled model, or a bundled recipe's name.")],
    model: o.Model = "mini-sd",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the student.")] = Path("out"),
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto keeps the checkpoint's own.")] = "auto",
    variant: Annotated[
        str | None,
        typer.Option(help="fp16: name the weight files so, as diffusers' variant=; they are in fp16 then."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The most of one weight file, such as 2GB.")] = "10GiB",
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Also send the student to this repository on the hub, user/name; a new one is private."),
    ] = None,
    slot_start: Annotated[
        str, typer.Option(help="Weights that the recipe brings along: fit to this model, zero, random, or copied.")
    ] = "fit",
    refit: Annotated[
        str | None,
        typer.Option(
            help="Solve what stays anew on this model: full, scale (a factor per channel) or none; by default as the "
            "recipe says, which of the recipes of others is none."
        ),
    ] = None,
    prompts: o.Prompts = None,
    calibration_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that convolutions and what stays are fitted on.")
    ] = CALIBRATION_PROMPTS,
    calibration_triples: Annotated[
        int,
        typer.Option(min=1, help="Moments of these runs that are kept, whose activations a fit holds in memory."),
    ] = MOMENTS,
    bands: Annotated[int, typer.Option(min=1, help="Timestep bands; at least as many as a slot has experts.")] = BANDS,
    steps: o.Steps = STEPS,
    guidance: o.Guidance = GUIDANCE,
    seed: o.Seed = 0,
    scheduler: o.Scheduler = None,
    device: o.Device = "auto",
    threads: o.Threads = None,
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Replay a recipe on a checkpoint of the same family, without a search.

    What the recipe brings along is fitted to this model. The recipes of published students bring nothing along: their
    cut is to be trained (`distill`), or, with --refit full, what stays is solved anew first.
    """
    path = find_recipe(recipe)
    content = load_recipe(path)
    check_output(out, overwrite, None, prompts)
    check_output(out, overwrite, None, path)
    shard_bytes = parse_bytes(max_shard_size)
    dtype = _dtype_of(variant, o.own_name(dtype))
    if slot_start not in ("fit", "zero", "random", "copied"):
        raise AsdmError(f"unknown slot start {slot_start!r}", "Use fit, zero, random or copied.")
    if refit is not None:
        content = _refitted(content, refit)
    if slot_start != "fit":
        why = f"does nothing with --slot-start {slot_start}, which fits nothing"
        o.refuse_given(context, ["refit", *(name for name in _FITTED if name != "slot_start")], why, "Leave it out.")
    if not content.brings_weights:
        o.refuse_given(context, _FITTED, "does nothing with a recipe that fits nothing", "Leave it out.")
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        fitting = o.load_options(device, "fp32", threads)
        load = o.load_options(
            "cpu", "fp32" if dtype == "auto" else dtype, None, allow_pickle, prediction_type=prediction_type
        )
        load = replace(load, dtype=None) if dtype == "auto" else load
        from asdm_compress.models.saving import FileLayout
        from asdm_compress.workflows.apply import SlotStart, Writing, run_apply
    from asdm_compress.assembly.calibration import Effort
    from asdm_compress.evaluation.prompts import read_prompts
    from asdm_compress.sampling.settings import SamplingSettings

    start = SlotStart(
        slot_start,  # type: ignore[arg-type]
        SamplingSettings(steps, guidance, seed),
        scheduler,
        None if prompts is None else tuple(read_prompts(prompts)),
        calibration_prompts,
        bands=bands,
        effort=Effort(calibration_triples),
        device=fitting.device,
    )
    writing = Writing(out, overwrite, FileLayout(variant, shard_bytes), push_to_hub, o.command_line())
    with telling_lines(path):
        result = run_apply(content, model, writing, load, start, output)
    if result.slots:
        how = "fitted to this model" if slot_start == "fit" else f"not fitted ({slot_start}): train before use"
        output.show(f"{result.slots} convolutions and narrowed modules {how}.")
    elif content.refit != "none" and slot_start != "fit":
        output.show(f"What stays is not refitted ({slot_start}): train before use.")
    elif result.removed and not content.brings_weights:
        output.show(
            "Nothing makes up for what is taken out: train the student with `asdm-compress distill`, or solve what "
            "stays anew with --refit full."
        )
    output.show(
        f"Wrote {out}: {result.kept} tensors inherited, {result.removed} removed; "
        f"{'opens in plain diffusers' if result.is_stock else 'opens after `import asdm_compress`'}."
    )
    if result.pushed:
        output.show(f"Sent to {result.pushed}")
    output.result(
        {
            "out": str(out),
            "stock": result.is_stock,
            "kept_tensors": result.kept,
            "removed_tensors": result.removed,
            "slots": result.slots,
            "pushed": result.pushed,
        }
    )


def _refitted(recipe: Recipe, refit: str) -> Recipe:
    """The recipe with another refit; what was measured of its own student does not hold for this one's."""
    if refit not in ("full", "scale", "none"):
        raise AsdmError(f"unknown refit {refit!r}", "Use full, scale or none.")
    if refit == recipe.refit:
        return recipe
    measured = {} if recipe.evidence is None else {"evidence": None, "distillation": None}
    found = recipe.model_copy(update={"refit": refit, **measured})
    if refit != "none" and not found.brings_weights:
        raise AsdmError("--refit does nothing with a recipe that takes nothing out", "Leave it out.")
    return found


def _dtype_of(variant: str | None, dtype: str) -> str:
    """The precision, which a variant's name says too."""
    if variant is None:
        return dtype
    if variant != "fp16":
        raise AsdmError(f"unknown variant {variant!r}", "Use fp16, or --dtype without a variant.")
    if dtype not in ("auto", variant):
        raise AsdmError(f"the variant {variant} cannot hold weights in {dtype}", "Leave one of the two out.")
    return variant
