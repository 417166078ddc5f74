"""Edits at units and sub-units: which are legal, and putting slots in the places of the modules that they take out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.core.edits import SHORTCUT, ConvSpec, Edit, conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.expert_conv import MultiExpertConv2d
from asdm_compress.models.sites import modules_of
from asdm_compress.models.slots import (
    ConvDownsampler,
    ConvResnet,
    ConvTransformer,
    ConvUpsampler,
    DiscardSkip,
    IdentityResnet,
    IdentityTransformer,
    NearestUpsampler,
    PartialTransformerBlock,
    PooledDownsampler,
    ShortcutResnet,
)

SlotWeights = Mapping[str, Mapping[str, Tensor]]  # unit path to the state of its `MultiExpertConv2d`
SUB_UNITS: Final = ("attn1", "attn2", "ff")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def legal_edits(unet: UNet2DConditionModel) -> dict[str, tuple[Edit, ...]]:
    """For every unit and sub-unit, the edits without weights of their own that keep all shapes right."""
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


def slot_kernels(unet: UNet2DConditionModel) -> dict[str, tuple[int, ...]]:
    """For every unit that a convolution can replace, the kernel sizes that make sense there.

    A sampler's own convolution is 3 x 3 already.
    """
    return {path: (1,) if "samplers." in path else (1, 3) for path, _ in _units(unet)}


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
    legal, kernels = legal_edits(unet), slot_kernels(unet)
    sub_units: dict[str, set[str]] = {}
    for path, edit in edits.items():
        if path not in legal:
            raise AsdmError(f"this UNet has no unit or sub-unit {path!r}", "See `asdm-compress profile` for its sites.")
        check_edit(path, edit, legal[path], kernels.get(path, ()))
        if ".transformer_blocks." in path:
            block, _, part = path.rpartition(".")
            sub_units.setdefault(block, set()).add(part)
    for path, parts in sub_units.items():
        _replace(unet, path, PartialTransformerBlock(unet.get_submodule(path), frozenset(parts)))
    for path, edit in edits.items():
        if ".transformer_blocks." not in path:
            slot = _slot(path, unet.get_submodule(path), edit)
            _replace(unet, path, slot if conv_spec(edit) is None else slot.to(unet.device, unet.dtype).eval())


def check_edit(path: str, edit: Edit, legal: tuple[Edit, ...], kernels: tuple[int, ...]) -> None:
    """Raise AsdmError unless the edit is possible at a path with these legal edits and slot kernels."""
    spec = conv_spec(edit)
    if (edit in legal) if spec is None else (spec.kernel in kernels):
        return
    convolutions = [f"conv{k}x{k} and its kin" for k in kernels]
    raise AsdmError(
        f"the edit {edit!r} is not possible at {path}", f"Possible there: {', '.join([*legal, *convolutions])}."
    )


def slot_of(unet: nn.Module, path: str) -> MultiExpertConv2d:
    """The convolution in the slot at a unit's path."""
    slot: MultiExpertConv2d = unet.get_submodule(f"{path}.slot")  # type: ignore[assignment]
    return slot


def removable_levels(unet: UNet2DConditionModel) -> tuple[int, ...]:
    """The levels from which on everything deeper can go: where the encoder's width there is what the decoder takes in.

    Removing level n takes the downsampler above it, all down blocks from n on, the mid block, and their up blocks.
    """
    count = len(unet.down_blocks)
    widths = [block.resnets[-1].out_channels for block in unet.down_blocks]
    decoded = [block.resnets[-1].out_channels for block in unet.up_blocks]
    return tuple(n for n in range(1, count) if widths[n - 1] == decoded[count - n - 1])


def edited_copy(
    unet: ModuleT,
    edits: Mapping[str, Edit],
    drop_mid: bool = False,
    keep_levels: int | None = None,
    slot_weights: SlotWeights | None = None,
) -> ModuleT:
    """A UNet with the edits applied whose every remaining parameter is the very tensor of the original.

    Only the containers on the way to an edited place are copied, so that it costs neither memory nor time. `drop_mid`
    takes the mid block out, `keep_levels` leaves only the first levels (see `removable_levels`). Convolutions whose
    weights are not given are zero.
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
    for path, weights in (slot_weights or {}).items():
        slot_of(root, path).load_state_dict(weights)
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


def _slot(path: str, module: Any, edit: Edit) -> nn.Module:
    kind, spec = path.split(".")[-2], conv_spec(edit)
    return _plain_slot(path, kind, module, edit) if spec is None else _conv_slot(kind, module, spec)


def _plain_slot(path: str, kind: str, module: Any, edit: Edit) -> nn.Module:
    if kind == "attentions":
        return IdentityTransformer()
    if kind == "downsamplers":
        return PooledDownsampler()
    if kind == "upsamplers":
        return NearestUpsampler()
    if edit == SHORTCUT:
        return ShortcutResnet(module.conv_shortcut, module.output_scale_factor)
    if path.startswith("up_blocks."):
        return DiscardSkip(module.out_channels)
    return IdentityResnet()


def _conv_slot(kind: str, module: Any, spec: ConvSpec) -> nn.Module:
    if kind == "attentions":
        return ConvTransformer(MultiExpertConv2d(module.in_channels, module.in_channels, spec))
    if kind == "downsamplers":
        return ConvDownsampler(MultiExpertConv2d(module.channels, module.out_channels, spec))
    if kind == "upsamplers":
        return ConvUpsampler(MultiExpertConv2d(module.channels, module.out_channels, spec))
    dense = not spec.separable and spec.rank is None
    # A dense kernel takes a 1 x 1 shortcut in; a factorised one could not express it.
    shortcut = None if dense else module.conv_shortcut
    return ConvResnet(
        MultiExpertConv2d(module.in_channels, module.out_channels, spec), shortcut, module.output_scale_factor
    )
