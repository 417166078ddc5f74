"""`export`: a model in the layout that another program reads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, check_space, output_file, output_folder
from asdm_compress.inheritance.members import HasMembers
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.collapse import collapse_experts
from asdm_compress.models.lazy import lazy_unet
from asdm_compress.models.ldm import text_encoder_to_ldm, unet_to_ldm, vae_to_ldm
from asdm_compress.models.loader import carry_loader, write_loader
from asdm_compress.models.loading import open_pipeline, open_unet
from asdm_compress.models.onnx_file import check_onnx, write_onnx
from asdm_compress.models.prediction import written_prediction
from asdm_compress.models.programs import Verdict, verdicts
from asdm_compress.models.resolve import resolve
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.models.stock_form import stock_form
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.workflows.progress import Progress

_FILES: Final = ("ldm", "sdcpp")
FORMATS: Final[Mapping[str, str]] = {
    "ldm": "one .safetensors file under the original code's names; a cut UNet is told by its keys alone",
    "sdcpp": "the same file under the names by which stable-diffusion.cpp knows BK-SDM-Tiny's UNet",
    "static": "a diffusers folder whose timestep experts are one kernel each",
    "per-step": "a diffusers folder whose timestep experts are one kernel per step of the sampler",
    "portable": "a diffusers folder that opens with trust_remote_code=True where this package is not installed",
    "onnx": "a folder with the UNet as model.onnx, checked in ONNX Runtime",
}


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written, and which programs open it.

    `difference` is how far ONNX Runtime's predictions were from torch's at most.
    """

    out: Path
    tensors: int
    bytes: int
    programs: tuple[Verdict, ...] = ()
    difference: float | None = None


def default_out(form: str) -> Path:
    """Where a model is written unless somebody says where."""
    return Path("model.safetensors" if form in _FILES else f"model-{form}")


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
    if form in _FILES and out.suffix != ".safetensors":
        raise AsdmError(
            f"{out} is no .safetensors file", f"The {form} format is a single file: --out model.safetensors."
        )
    if form == "onnx":
        check_onnx()
        if options.dtype not in (None, torch.float32):
            raise AsdmError("an ONNX file is written and checked in fp32", "Leave --dtype out; convert the file later.")
        options = replace(options, dtype=torch.float32)
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        check_output(out, overwrite, source.path)
        if form == "portable":
            return _write_portable(source, out, options, overwrite)
        # Of an ONNX file the UNet is all: a pipeline's other parts are not ours to change.
        pipeline = open_pipeline(source, options) if source.is_pipeline and form != "onnx" else None
        unet = pipeline.unet if pipeline is not None else open_unet(source, options)
    for note in source.notes:
        progress.note(note)
    if isinstance(unet, HasMembers):
        raise AsdmError(f"{source.name} is switched between members, which only a folder can hold", "Use portable.")
    if form == "onnx":
        return _write_onnx(unet, out, progress, overwrite)
    if form in _FILES:
        return _write_file(pipeline, unet, out, form, progress)
    return _write_collapsed(source, pipeline, unet, out, form, steps, scheduler, progress, overwrite)


def _write_file(
    pipeline: StableDiffusionPipeline | None, unet: UNet2DConditionModel, out: Path, form: str, progress: Progress
) -> ExportResult:
    unet = stock_form(unet)
    programs = verdicts(unet, "sdcpp" if form == "sdcpp" else "ldm", is_whole=pipeline is not None)
    if form == "sdcpp" and not any(program.opens for program in programs):
        other = any(program.opens for program in verdicts(unet, "ldm", is_whole=pipeline is not None))
        # A UNet without edits has names there, whichever programs open it; one with edits has a loader of its own.
        is_edited = isinstance(unet, AssembledUNet2DConditionModel)
        hint = "No file format has names for it; portable and onnx take it." if is_edited else "Try --format ldm."
        hint = "Try --format ldm." if other else hint
        raise AsdmError(f"stable-diffusion.cpp does not open this UNet: {programs[0].why}", hint)
    tensors: dict[str, Tensor] = unet_to_ldm(unet, with_gaps=form == "sdcpp")
    metadata = {"format": "pt"}
    if pipeline is not None:
        tensors |= vae_to_ldm(pipeline.vae)
        tensors |= text_encoder_to_ldm(pipeline.text_encoder)
        metadata |= written_prediction(pipeline)
    check_space(out, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    with progress.stage("Writing"), output_file(out) as aside:
        save_file(tensors, aside, metadata=metadata)
    return ExportResult(out, len(tensors), out.stat().st_size, programs)


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
    sampler = copy.deepcopy(pipeline.scheduler)  # see `sampler_timeline`
    sampler.set_timesteps(steps)
    with progress.stage("Collapsing the experts"):
        student = collapse_experts(unet, sampler.timesteps.tolist(), per_step=form == "per-step")
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        pipeline.register_modules(unet=student)
        save_pipeline(pipeline, aside)
    return ExportResult(out, len(student.state_dict()), _size(out), verdicts(student, "folder", is_whole=True))


def _write_onnx(unet: UNet2DConditionModel, out: Path, progress: Progress, overwrite: bool) -> ExportResult:
    check_space(out, sum(p.numel() * p.element_size() for p in unet.parameters()))
    with progress.stage("Exporting, and comparing with torch"), output_folder(out, overwrite) as aside:
        difference = write_onnx(unet, aside)
    return ExportResult(out, len(unet.state_dict()), _size(out), verdicts(unet, "onnx", is_whole=False), difference)


def _write_portable(source: Source, out: Path, options: LoadOptions, overwrite: bool) -> ExportResult:
    """Copy a student's folder, which holds its UNet's own loader already, and let its index name that."""
    with lazy_unet(source, options) as lazy:
        tensors, student = len(lazy.stored), lazy.unet
    if not isinstance(student, AssembledUNet2DConditionModel):
        raise AsdmError(f"{source.name} needs no loader of its own", "It opens in plain diffusers as it is.")
    if source.kind != "pipeline folder":
        raise AsdmError(
            f"{source.name} is a UNet alone", "It opens with AutoModel and trust_remote_code=True as it is."
        )
    if options.dtype is not None:
        raise AsdmError("a portable folder has the weights as they are", "Leave --dtype out.")
    assert source.path is not None
    with output_folder(out, overwrite) as aside:
        # Into a folder inside of itself: the copy is not copied.
        shutil.copytree(source.path, aside, dirs_exist_ok=True, ignore=lambda _, names: {aside.name} & {*names})
        write_loader(aside / "unet", type(student).__name__)
        carry_loader(aside)
    return ExportResult(out, tensors, _size(out), verdicts(student, "folder", is_whole=True))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
