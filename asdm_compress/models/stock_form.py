"""The plain diffusers form of a UNet whose edits compute the same function in less time and nothing else."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.core.edits import EXACT
from asdm_compress.models.signatures import own_config


def stock_form(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet without such edits, with its very tensors; itself where it has none, or others beside them."""
    edits = unet.config.get("edits") or {}
    if not edits or any(edit not in EXACT for edit in edits.values()):
        return unet
    with torch.device("meta"):
        plain = UNet2DConditionModel(**own_config(unet, UNet2DConditionModel))
    plain.load_state_dict(unet.state_dict(), strict=True, assign=True)
    return plain.eval().requires_grad_(False)
