"""What a pass that calls a UNet's layers one by one would leave out: hooks and patches of the modules around them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

import torch
from accelerate.hooks import AlignDevicesHook
from diffusers import UNet2DConditionModel
from torch import nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.sites import modules_of

# Packages whose modules' forwards are known; the second is this one, by the name that it has here.
_KNOWN: Final = ("diffusers.", __name__.partition(".")[0])
_HINT: Final = (
    "Remove it first. Weights can be moved for the whole model (enable_model_cpu_offload) or for single layers "
    "(enable_sequential_cpu_offload, enable_group_offload with leaf_level)."
)


def check_nothing_left_out(unet: UNet2DConditionModel, opened: Collection[str]) -> None:
    """Raise AsdmError for a hook or a patch of a module that only a plain forward pass calls.

    These are the UNet's blocks, and the transformers at the paths `opened` with their own blocks. What hangs on the
    UNet itself is called around every pass, and what hangs on a layer with it wherever that computes.
    """
    devices: set[torch.device] = set()
    for path, module in (("the UNet", unet), *_left_out(unet, opened)):
        if not type(module).__module__.startswith(_KNOWN):
            raise AsdmError(
                f"{path} is a {type(module).__module__}.{type(module).__qualname__}, whose own forward feature "
                "inheritance would leave out",
                "Undo the patch first.",
            )
        if module is unet:
            continue
        hook: Any = getattr(module, "_hf_hook", None)
        if type(hook) is AlignDevicesHook and not hook.offload:
            # Only says where its inputs have to be, which every layer inside says too.
            devices.add(torch.device("cpu" if hook.execution_device is None else hook.execution_device))
        elif hook is not None or "forward" in module.__dict__:
            _refuse(path, type(hook).__name__ if hook is not None else _name_of(module))
        if module._forward_hooks or module._forward_pre_hooks:
            _refuse(path, "a hook")
    if len(devices) > 1:
        raise AsdmError("features cannot be inherited by a UNet that is spread over several devices")


def _left_out(unet: UNet2DConditionModel, opened: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for side in ("down_blocks", "up_blocks"):
        for i, block in enumerate(getattr(unet, side)):
            yield f"{side}.{i}", block
    if unet.mid_block is not None:
        yield "mid_block", unet.mid_block
    for path in opened:
        transformer = unet.get_submodule(path)
        yield path, transformer
        for k, block in enumerate(modules_of(transformer, "transformer_blocks")):
            yield f"{path}.transformer_blocks.{k}", block


def _name_of(module: nn.Module) -> str:
    registry = getattr(module, "_diffusers_hook", None)
    names = ", ".join(getattr(registry, "hooks", {}))
    return f"diffusers' {names}" if names else "a forward of its own"


def _refuse(path: str, what: str) -> None:
    raise AsdmError(f"{path} carries {what}, which feature inheritance would leave out", _HINT)
