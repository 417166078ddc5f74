"""Edits at units and sub-units: which are legal, and putting slots in the places of the modules that they take out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, TypeVar

from diffusers import UNet2DConditionModel
from torch import nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.sites import modules_of
from asdm_compress.models.slots import (
    DiscardSkip,
    IdentityResnet,
    IdentityTransformer,
    NearestUpsampler,
    PartialTransformerBlock,
    PooledDownsampler,
    ShortcutResnet,
)

Edit = Literal["drop", "shortcut"]
EDITS: Final[tuple[Edit, ...]] = ("drop", "shortcut")
SUB_UNITS: Final = ("attn1", "attn2", "ff")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def legal_edits(unet: UNet2DConditionModel) -> dict[str, tuple[Edit, ...]]:
    """For every unit and sub-unit, the edits that keep all shapes right."""
    legal: dict[str, tuple[Edit, ...]] = {}
    discardable = set(_resnets_whose_skip_can_go(unet))
    for path, module in _units(unet):
        if ".resnets." not in path or module.conv_shortcut is None:
            legal[path] = ("drop",)
        else:
            legal[path] = ("drop", "shortcut") if path in discardable else ("shortcut",)
        for k, block in enumerate(modules_of(module, "transformer_blocks")):
            for part in SUB_UNITS:
                if getattr(block, part, None) is not None:
                    legal[f"{path}.transformer_blocks.{k}.{part}"] = ("drop",)
    return legal


def _units(unet: UNet2DConditionModel) -> Iterator[tuple[str, nn.Module]]:
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    if unet.mid_block is not None:
        blocks.append(("mid_block", unet.mid_block))
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    for path, block in blocks:
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            for j, module in enumerate(modules_of(block, name)):
                if module is not None:
                    yield f"{path}.{name}.{j}", module


def _resnets_whose_skip_can_go(unet: UNet2DConditionModel) -> Iterator[str]:
    """Decoder ResNets whose hidden input, without the skip connection behind it, already has the output's width."""
    skips = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        skips += [sampler.out_channels for sampler in modules_of(block, "downsamplers")]
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            if resnet.in_channels - skips.pop() == resnet.out_channels:
                yield f"up_blocks.{i}.resnets.{j}"


def apply_edits(unet: UNet2DConditionModel, edits: Mapping[str, Edit]) -> None:
    """Put the slots of `edits` (unit or sub-unit path to edit) into `unet`, in place.

    Raises AsdmError for a path that is no unit or sub-unit of this UNet and for an edit that is not legal there.
    """
    legal = legal_edits(unet)
    sub_units: dict[str, set[str]] = {}
    for path, edit in edits.items():
        if path not in legal:
            raise AsdmError(f"this UNet has no unit or sub-unit {path!r}", "See `asdm-compress profile` for its sites.")
        if edit not in legal[path]:
            raise AsdmError(
                f"the edit {edit!r} is not possible at {path}", f"Possible there: {', '.join(legal[path])}."
            )
        if ".transformer_blocks." in path:
            block, _, part = path.rpartition(".")
            sub_units.setdefault(block, set()).add(part)
    for path, parts in sub_units.items():
        _replace(unet, path, PartialTransformerBlock(unet.get_submodule(path), frozenset(parts)))
    for path, edit in edits.items():
        if ".transformer_blocks." not in path:
            _replace(unet, path, _slot(path, unet.get_submodule(path), edit))


def removable_levels(unet: UNet2DConditionModel) -> tuple[int, ...]:
    """The levels from which on everything deeper can go: where the encoder's width there is what the decoder takes in.

    Removing level n takes the downsampler above it, all down blocks from n on, the mid block, and their up blocks.
    """
    count = len(unet.down_blocks)
    widths = [block.resnets[-1].out_channels for block in unet.down_blocks]
    decoded = [block.resnets[-1].out_channels for block in unet.up_blocks]
    return tuple(n for n in range(1, count) if widths[n - 1] == decoded[count - n - 1])


def edited_copy(
    unet: ModuleT, edits: Mapping[str, Edit], drop_mid: bool = False, keep_levels: int | None = None
) -> ModuleT:
    """A UNet with the edits applied whose every remaining parameter is the very tensor of the original.

    Only the containers on the way to an edited place are copied, so that it costs neither memory nor time. `drop_mid`
    takes the mid block out, `keep_levels` leaves only the first levels (see `removable_levels`).
    """
    twins: dict[str, Any] = {"": _shallow(unet)}
    if drop_mid or keep_levels is not None:
        twins[""]._modules["mid_block"] = None
    for path in edits:
        names = path.split(".")[:-1]
        for depth, name in enumerate(names):
            here = ".".join(names[: depth + 1])
            if here not in twins:
                parent = twins[".".join(names[:depth])]
                twins[here] = parent._modules[name] = _shallow(parent._modules[name])
    root: ModuleT = twins[""]
    apply_edits(root, edits)
    if keep_levels is not None:
        _remove_levels(root, keep_levels)
    return root


def _remove_levels(root: Any, keep: int) -> None:
    """Leave the first `keep` levels of a tree of which only the root is known to be a copy."""
    down, up = list(root.down_blocks), list(root.up_blocks)
    last = _shallow(down[keep - 1])
    last._modules["downsamplers"] = None
    root._modules["down_blocks"] = nn.ModuleList([*down[: keep - 1], last])
    root._modules["up_blocks"] = nn.ModuleList(up[len(up) - keep :])
    root.num_upsamplers = keep - 1


def _shallow(module: ModuleT) -> ModuleT:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _replace(unet: nn.Module, path: str, slot: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    unet.get_submodule(parent)._modules[name] = slot


def _slot(path: str, module: nn.Module, edit: Edit) -> nn.Module:
    kind = path.split(".")[-2]
    if kind == "attentions":
        return IdentityTransformer()
    if kind == "downsamplers":
        return PooledDownsampler()
    if kind == "upsamplers":
        return NearestUpsampler()
    if edit == "shortcut":
        return ShortcutResnet(module.conv_shortcut, module.output_scale_factor)  # type: ignore[arg-type]
    if path.startswith("up_blocks."):
        return DiscardSkip(module.out_channels)  # type: ignore[arg-type]
    return IdentityResnet()
