"""Edits at units and sub-units: which are legal, and putting slots in the places of the modules that they take out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.core.edits import (
    DROP,
    SHARED,
    SHORTCUT,
    SUBPIXEL,
    ConvSpec,
    Edit,
    conv_spec,
    has_weights,
    kept_share,
)
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.expert_conv import MultiExpertConv2d
from asdm_compress.models.shared import can_be_shared, shared
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
from asdm_compress.models.subpixel import SubpixelUpsampler
from asdm_compress.models.tree import shallow_copy
from asdm_compress.models.widths import Inner, inner_at, inner_of, narrow_unit, own_names

# The path of a unit or sub-unit to the tensors that its edit brings along (see `own_tensors`), and to those of a kept
# module that take the places of the old ones, by their names inside it.
SlotWeights = Mapping[str, Mapping[str, Tensor]]
SUB_UNITS: Final = ("attn1", "attn2", "ff")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def legal_edits(unet: UNet2DConditionModel) -> dict[str, tuple[Edit, ...]]:
    """For every unit and sub-unit, the edits without weights of their own that keep all shapes right.

    Narrowing and convolutions come on top (`inner_at`, `slot_kernels`).
    """
    legal: dict[str, tuple[Edit, ...]] = {}
    discardable = set(_resnets_whose_skip_can_go(unet))
    for path, module in _units(unet):
        if ".upsamplers." in path and _is_subpixel(module):
            legal[path] = ("drop", SUBPIXEL)
        elif ".resnets." not in path or module.conv_shortcut is None:
            legal[path] = ("drop",)
        else:
            legal[path] = ("drop", "shortcut") if path in discardable else ("shortcut",)
        for k, block in enumerate(modules_of(module, "transformer_blocks")):
            for part in SUB_UNITS:
                if getattr(block, part, None) is not None:
                    legal[f"{path}.transformer_blocks.{k}.{part}"] = ("drop",)
    for path in _before_the_text(unet):
        legal[path] = (*legal[path], SHARED)
    return legal


def _before_the_text(unet: UNet2DConditionModel) -> Iterator[str]:
    """The units and self-attentions that both guidance branches run on the same numbers, and that can be shared."""
    for i, block in enumerate(unet.down_blocks):
        attentions = modules_of(block, "attentions")
        for j, resnet in enumerate(modules_of(block, "resnets")):
            if can_be_shared(resnet):
                yield f"down_blocks.{i}.resnets.{j}"
            for k, inner in enumerate(modules_of(attentions[j], "transformer_blocks") if j < len(attentions) else ()):
                if can_be_shared(getattr(inner, "attn1", None)) and not getattr(inner, "only_cross_attention", False):
                    yield f"down_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn1"
                if getattr(inner, "attn2", None) is not None:
                    return


def slot_kernels(unet: UNet2DConditionModel) -> dict[str, tuple[int, ...]]:
    """For every unit that a convolution can replace, the kernel sizes that make sense there.

    A sampler's own convolution is 3 x 3 already.
    """
    return {path: (1,) if "samplers." in path else (1, 3) for path, _ in _units(unet)}


def _is_subpixel(upsampler: Any) -> bool:
    """Whether an upsampler is a nearest-neighbour interpolation followed by a 3 x 3 convolution."""
    conv = getattr(upsampler, "conv", None)
    plain = upsampler.norm is None and upsampler.interpolate and not upsampler.use_conv_transpose
    return plain and isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1)


def _units(unet: UNet2DConditionModel) -> Iterator[tuple[str, nn.Module]]:
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    if unet.mid_block is not None:
        blocks.append(("mid_block", unet.mid_block))
    # A ControlNet has no decoder.
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(modules_of(unet, "up_blocks"))]
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
    for i, block in enumerate(modules_of(unet, "up_blocks")):
        for j, resnet in enumerate(modules_of(block, "resnets")):
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
        check_edit(path, edit, legal[path], kernels.get(path, ()), inner_at(unet, path))
        if ".transformer_blocks." in path and edit == DROP:
            block, _, part = path.rpartition(".")
            sub_units.setdefault(block, set()).add(part)
    for path, parts in sub_units.items():
        _replace(unet, path, PartialTransformerBlock(unet.get_submodule(path), frozenset(parts)))
    for path, edit in edits.items():
        share = kept_share(edit)
        if edit == SHARED:
            _replace(unet, path, shared(unet.get_submodule(path)))
        elif share is not None:
            _replace(unet, path, narrow_unit(unet.get_submodule(path), share))
        elif ".transformer_blocks." not in path:
            slot = _slot(path, unet.get_submodule(path), edit)
            _replace(unet, path, slot if conv_spec(edit) is None else slot.to(unet.device, unet.dtype).eval())


def check_edit(path: str, edit: Edit, legal: tuple[Edit, ...], kernels: tuple[int, ...], inner: Inner | None) -> None:
    """Raise AsdmError unless the edit is possible at a path with these legal edits, slot kernels, and inner width."""
    spec, share = conv_spec(edit), kept_share(edit)
    if share is not None:
        possible = inner is not None and inner.can_narrow(share)
    else:
        possible = (edit in legal) if spec is None else (spec.kernel in kernels)
    if possible:
        return
    others = [f"conv{k}x{k} and its kin" for k in kernels]
    others += [f"narrow, to {inner.kept(0)} to {inner.count - 1} of {inner.count} structures"] if inner else []
    raise AsdmError(f"the edit {edit!r} is not possible at {path}", f"Possible there: {', '.join([*legal, *others])}.")


def weights_path(unet: nn.Module, path: str) -> str:
    """Where at an edited path lies what the edit brings along: the slot's convolution, or the narrowed module."""
    return f"{path}.slot" if hasattr(unet.get_submodule(path), "slot") else path


def own_tensors(unet: nn.Module, path: str, edit: Edit) -> tuple[str, ...]:
    """The names, in the module at `weights_path`, of the tensors that an edit brings along."""
    if not has_weights(edit):
        return ()
    module = unet.get_submodule(weights_path(unet, path))
    if kept_share(edit) is None:
        return tuple(module.state_dict())
    inner = inner_of(module)
    assert inner is not None
    return own_names(module, inner)


def load_weights(unet: nn.Module, path: str, edit: Edit, weights: Mapping[str, Tensor]) -> None:
    """Give an edited path all the tensors that its edit brings along; raises KeyError where one is missing."""
    own = {name: weights[name] for name in own_tensors(unet, path, edit)}
    unet.get_submodule(weights_path(unet, path)).load_state_dict(own, strict=False)


def put_tensors(unet: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the places of old ones, by their names inside the module at a path.

    The modules on the way are copied first: those that share them with `unet` keep theirs.
    """
    for name, tensor in tensors.items():
        *way, last = (f"{path}.{name}" if path else name).split(".")
        here: Any = unet
        for part in way:
            here._modules[part] = shallow_copy(here._modules[part])
            here = here._modules[part]
        old = here._parameters[last]
        if old.shape != tensor.shape:
            raise AsdmError(f"{path}.{name} has the shape {tuple(old.shape)}, not {tuple(tensor.shape)}")
        new = nn.Parameter(tensor.detach().to(old), requires_grad=False)
        here._parameters = {**here._parameters, last: new}


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
    weights are not given are zero, narrowed modules whose weights are not given keep their largest structures. Weights
    at other paths take the places of the old ones there.
    """
    twins: dict[str, Any] = {"": shallow_copy(unet)}
    if drop_mid or keep_levels is not None:
        twins[""]._modules["mid_block"] = None
    for path in edits:
        names = path.split(".")[:-1]
        for depth, name in enumerate(names):
            here = ".".join(names[: depth + 1])
            if here not in twins:
                parent = twins[".".join(names[:depth])]
                twins[here] = parent._modules[name] = shallow_copy(parent._modules[name])
    root: ModuleT = twins[""]
    apply_edits(root, edits)
    for path, weights in (slot_weights or {}).items():
        own: tuple[str, ...] = ()
        if has_weights(edits.get(path, DROP)):
            load_weights(root, path, edits[path], weights)
            own = own_tensors(root, path, edits[path])
        put_tensors(root, path, {name: tensor for name, tensor in weights.items() if name not in own})
    if keep_levels is not None:
        _remove_levels(root, keep_levels)
    return root


def _remove_levels(root: Any, keep: int) -> None:
    """Leave the first `keep` levels of a tree of which only the root is known to be a copy."""
    down, up = list(root.down_blocks), list(root.up_blocks)
    last = shallow_copy(down[keep - 1])
    last._modules["downsamplers"] = None
    root._modules["down_blocks"] = nn.ModuleList([*down[: keep - 1], last])
    root._modules["up_blocks"] = nn.ModuleList(up[len(up) - keep :])
    root.num_upsamplers = keep - 1


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
        return SubpixelUpsampler(module) if edit == SUBPIXEL else NearestUpsampler()
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
    slot = MultiExpertConv2d(module.in_channels, module.out_channels, spec)
    if dense and module.conv_shortcut is not None and slot.bias.device.type != "meta":
        _take_in(slot, module.conv_shortcut, module.output_scale_factor)
    # A dense kernel takes a 1 x 1 shortcut in; a factorised one could not express it.
    return ConvResnet(slot, None if dense else module.conv_shortcut, module.output_scale_factor)


@torch.no_grad()
def _take_in(slot: MultiExpertConv2d, shortcut: nn.Conv2d, scale: float) -> None:
    """Let every expert do what the shortcut does by itself: what is not fitted is then as if it were empty."""
    if shortcut.weight.device.type == "meta":
        return
    # A slot is made on the host, wherever the UNet is.
    middle, weight = slot.spec.kernel // 2, shortcut.weight.to(slot.bias)
    slot.weights[0][:, :, :, middle, middle].add_(weight[:, :, 0, 0] / scale)
    if shortcut.bias is not None:
        slot.bias.add_(shortcut.bias.to(slot.bias) / scale)
