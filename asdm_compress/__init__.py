"""Makes a Stable Diffusion UNet fit a budget: faster and smaller with the least loss, proven by measurement."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asdm_compress.core.errors import AsdmError, ExitCode

if TYPE_CHECKING:
    from asdm_compress.assembly.controlnet import controlnet_from, remap_controlnet
    from asdm_compress.assembly.ip_adapter import remap_ip_adapter
    from asdm_compress.assembly.lora import remap_lora
    from asdm_compress.assembly.plan import Plan
    from asdm_compress.assembly.surgery import assemble
    from asdm_compress.inheritance.attach import inheriting
    from asdm_compress.models.assembled_controlnet import AssembledControlNetModel
    from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
    from asdm_compress.models.loading import load_pipeline
    from asdm_compress.profiling.profile import Profile, ProfileSettings, load_profile, profile
    from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
    from asdm_compress.workflows.calibrate import calibrate
    from asdm_compress.workflows.distill import distill
    from asdm_compress.workflows.evaluate import evaluate
    from asdm_compress.workflows.plan import plan
    from asdm_compress.workflows.report import write_report

# Everything that needs torch is imported on first use, so that `--help` and this import stay fast.
_LAZY = {
    "AssembledControlNetModel": "asdm_compress.models.assembled_controlnet",
    "AssembledUNet2DConditionModel": "asdm_compress.models.assembled_unet",
    # diffusers looks up the base class of a pipeline's part in the library that the part comes from.
    "ModelMixin": "diffusers",
    "Plan": "asdm_compress.assembly.plan",
    "Profile": "asdm_compress.profiling.profile",
    "ProfileSettings": "asdm_compress.profiling.profile",
    "SwitchedUNet2DConditionModel": "asdm_compress.switching.switched_unet",
    "assemble": "asdm_compress.assembly.surgery",
    "calibrate": "asdm_compress.workflows.calibrate",
    "distill": "asdm_compress.workflows.distill",
    "evaluate": "asdm_compress.workflows.evaluate",
    "inheriting": "asdm_compress.inheritance.attach",
    "write_report": "asdm_compress.workflows.report",
    "controlnet_from": "asdm_compress.assembly.controlnet",
    "plan": "asdm_compress.workflows.plan",
    "load_pipeline": "asdm_compress.models.loading",
    "load_profile": "asdm_compress.profiling.profile",
    "profile": "asdm_compress.profiling.profile",
    "remap_controlnet": "asdm_compress.assembly.controlnet",
    "remap_ip_adapter": "asdm_compress.assembly.ip_adapter",
    "remap_lora": "asdm_compress.assembly.lora",
}

__all__ = [
    "AsdmError",
    "AssembledControlNetModel",
    "AssembledUNet2DConditionModel",
    "ExitCode",
    "Plan",
    "Profile",
    "ProfileSettings",
    "SwitchedUNet2DConditionModel",
    "assemble",
    "calibrate",
    "controlnet_from",
    "distill",
    "evaluate",
    "inheriting",
    "load_pipeline",
    "load_profile",
    "plan",
    "profile",
    "remap_controlnet",
    "remap_ip_adapter",
    "remap_lora",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
