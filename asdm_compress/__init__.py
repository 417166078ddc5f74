"""Makes a Stable Diffusion UNet fit a budget: faster and smaller with the least loss, proven by measurement."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asdm_compress.core.errors import AsdmError, ExitCode

if TYPE_CHECKING:
    from asdm_compress.assembly.plan import Plan
    from asdm_compress.assembly.surgery import assemble
    from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
    from asdm_compress.models.loading import load_pipeline
    from asdm_compress.profiling.profile import Profile, ProfileSettings, load_profile, profile
    from asdm_compress.workflows.plan import plan

# Everything that needs torch is imported on first use, so that `--help` and this import stay fast.
_LAZY = {
    "AssembledUNet2DConditionModel": "asdm_compress.models.assembled_unet",
    # diffusers looks up the base class of a pipeline's part in the library that the part comes from.
    "ModelMixin": "diffusers",
    "Plan": "asdm_compress.assembly.plan",
    "Profile": "asdm_compress.profiling.profile",
    "ProfileSettings": "asdm_compress.profiling.profile",
    "assemble": "asdm_compress.assembly.surgery",
    "plan": "asdm_compress.workflows.plan",
    "load_pipeline": "asdm_compress.models.loading",
    "load_profile": "asdm_compress.profiling.profile",
    "profile": "asdm_compress.profiling.profile",
}

__all__ = [
    "AsdmError",
    "AssembledUNet2DConditionModel",
    "ExitCode",
    "Plan",
    "Profile",
    "ProfileSettings",
    "assemble",
    "load_pipeline",
    "load_profile",
    "plan",
    "profile",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
