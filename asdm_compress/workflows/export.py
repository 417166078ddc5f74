"""`export`: a model in the layout that another program reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, output_file, output_folder
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.collapse import collapse_experts
from asdm_compress.models.ldm import text_encoder_to_ldm, unet_to_ldm, vae_to_ldm
from asdm_compress.models.loading import LoadOptions, Source, open_pipeline, open_unet, resolve
from asdm_compress.models.saving import save_pipeline
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.workflows.progress import Progress

FORMATS: Final[Mapping[str, str]] = {
    "ldm": "one .safetensors file with the original code's names, as A1111, ComfyUI and stable-diffusion.cpp read it",
    "static": "a diffusers folder whose timestep experts are one kernel each",
    "per-step": "a diffusers folder whose timestep experts are one kernel per step of the sampler",
}


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written: the tensors of a file, or the experts that were collapsed."""

    out: Path
    tensors: int
    bytes: int


def run_export(
    model: str,
    out: Path,
    form: str,
    options: LoadOptions,
    steps: int,
    scheduler: str | None,
    progress: Progress,
    overwrite: bool = False,
) -> ExportResult:
    """Write `model` in another layout, its weights in the precision that they have unless `options` say otherwise.

    Raises AsdmError for a layout that cannot express the model, saying what it lacks.
    """
    if form not in FORMATS:
        raise AsdmError(f"unknown format {form!r}", f"Formats: {', '.join(FORMATS)}.")
    if form == "ldm" and out.suffix != ".safetensors":
        raise AsdmError(f"{out} is no .safetensors file", "The ldm format is a single file: --out model.safetensors.")
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(out, overwrite, source.path)
        pipeline = open_pipeline(source, options) if source.kind == "pipeline folder" else None
        unet = pipeline.unet if pipeline is not None else open_unet(source, options)
    if form == "ldm":
        return _write_file(pipeline, unet, out, progress)
    return _write_collapsed(source, pipeline, unet, out, form, steps, scheduler, progress, overwrite)


def _write_file(
    pipeline: StableDiffusionPipeline | None, unet: UNet2DConditionModel, out: Path, progress: Progress
) -> ExportResult:
    tensors: dict[str, Tensor] = unet_to_ldm(unet)
    if pipeline is not None:
        tensors |= vae_to_ldm(pipeline.vae)
        tensors |= text_encoder_to_ldm(pipeline.text_encoder)
    with progress.stage("Writing"), output_file(out) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    return ExportResult(out, len(tensors), out.stat().st_size)


def _write_collapsed(  # noqa: PLR0913, PLR0917 - one step of the command
    source: Source,
    pipeline: StableDiffusionPipeline | None,
    unet: UNet2DConditionModel,
    out: Path,
    form: str,
    steps: int,
    scheduler: str | None,
    progress: Progress,
    overwrite: bool,
) -> ExportResult:
    if not isinstance(unet, AssembledUNet2DConditionModel):
        raise AsdmError(f"{source.name} has no experts to collapse", "It is a plain diffusers UNet.")
    if pipeline is None:
        raise AsdmError(f"{source.name} is a UNet alone, without a sampler", "Give the whole pipeline folder.")
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline)
    sampler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    sampler.set_timesteps(steps)
    with progress.stage("Collapsing the experts"):
        student = collapse_experts(unet, sampler.timesteps.tolist(), per_step=form == "per-step")
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        pipeline.register_modules(unet=student)
        save_pipeline(pipeline, aside)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return ExportResult(out, len(student.state_dict()), size)
