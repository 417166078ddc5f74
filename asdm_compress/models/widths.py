"""Inner widths: ResNets, feed-forwards and attentions that lose some of their inner channels and keep their borders.

What goes goes in whole structures, so that what stays computes what it did before: a group of the second normalisation
of a ResNet, a hidden channel of a feed-forward, a head of an attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from asdm_compress.models.tree import shallow_copy

HIDDEN_MULTIPLE: Final = 8  # kept hidden channels of a feed-forward: what matrix units like

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Inner:
    """The inner width of a module: `count` structures of `size` channels.

    `producers` are the parts whose outputs are inner channels, each with the number of times that these are stacked
    there (a gated feed-forward has them twice); `projection` is the part that takes them in.
    """

    count: int
    size: int
    producers: Mapping[str, int]
    projection: str

    def kept(self, share: float) -> int:
        """How many structures a share of the width is: at least one; of hidden channels a multiple of eight."""
        count = max(1, round(share * self.count))
        if self.size == 1 and self.count % HIDDEN_MULTIPLE == 0:
            count = max(HIDDEN_MULTIPLE, count // HIDDEN_MULTIPLE * HIDDEN_MULTIPLE)
        return count

    def can_narrow(self, share: float) -> bool:
        """Whether a share leaves fewer structures than there are."""
        return self.kept(share) < self.count

    def channels(self, structures: Tensor) -> Tensor:
        """The inner channels of some structures, in their order."""
        return (structures[:, None] * self.size + torch.arange(self.size)).flatten()


def inner_of(module: Any) -> Inner | None:
    """The inner width of a module, or None for one that has none that is known here."""
    if hasattr(module, "conv1") and hasattr(module, "conv2") and isinstance(module.norm2, nn.GroupNorm):
        if module.time_embedding_norm != "default":
            return None
        parts = {"conv1": 1, "norm2": 1} | ({"time_emb_proj": 1} if module.time_emb_proj is not None else {})
        groups = module.norm2.num_groups
        return Inner(groups, module.conv2.in_channels // groups, parts, "conv2")
    if hasattr(module, "net") and isinstance(module.net[-1], nn.Linear):
        first, hidden = getattr(module.net[0], "proj", None), module.net[-1].in_features
        if isinstance(first, nn.Linear) and first.out_features % hidden == 0:
            return Inner(hidden, 1, {"net.0.proj": first.out_features // hidden}, f"net.{len(module.net) - 1}")
    if hasattr(module, "to_q") and hasattr(module, "heads"):
        lone = all(getattr(module, name, None) is None for name in ("norm_q", "norm_k", "add_k_proj", "group_norm"))
        inner = module.to_out[0].in_features
        if lone and module.to_k.out_features == inner:
            return Inner(module.heads, inner // module.heads, {"to_q": 1, "to_k": 1, "to_v": 1}, "to_out.0")
    return None


def inner_widths(unet: nn.Module) -> dict[str, Inner]:
    """Every ResNet, attention and feed-forward of a UNet's blocks that can be narrowed, by path."""
    found = {path: inner_of(module) for path, module in unet.named_modules() if _is_in_a_block(path)}
    return {path: inner for path, inner in found.items() if inner is not None}


def inner_at(unet: nn.Module, path: str) -> Inner | None:
    """The same of one path alone, which the UNet has; None for what cannot be narrowed."""
    return inner_of(unet.get_submodule(path)) if _is_in_a_block(path) else None


def _is_in_a_block(path: str) -> bool:
    return any(f".{name}." in f".{path}." for name in ("resnets", "transformer_blocks"))


def narrowed(module: ModuleT, inner: Inner, structures: Tensor) -> ModuleT:
    """A copy that has only some structures of its inner width; all but `own_names` is shared.

    `structures` are their numbers, (kept,), ascending. The diffusers attributes that say a width follow.
    """
    twin = shallow_copy(module)
    keep = inner.channels(structures)
    width = inner.count * inner.size
    for name, stacked in inner.producers.items():
        part = _own(twin, name)
        rows = torch.cat([keep + i * width for i in range(stacked)])
        _select(part, "weight", 0, rows)
        _select(part, "bias", 0, rows)
        if isinstance(part, nn.GroupNorm):
            part.num_groups = len(structures)
    last = _own(twin, inner.projection)
    _select(last, "weight", 1, keep)
    bias = last._parameters.get("bias")
    if bias is not None:
        # What is fitted later is copied into the parameters: none of them may be the teacher's.
        _select(last, "bias", 0, torch.arange(len(bias)))
    for name in (*inner.producers, inner.projection):
        _tell_widths(twin.get_submodule(name))
    if inner.projection == "to_out.0":
        whole: Any = twin
        whole.heads = whole.sliceable_head_dim = len(structures)
        whole.inner_dim = whole.inner_kv_dim = len(keep)
    return twin


def largest_structures(module: nn.Module, inner: Inner, count: int) -> Tensor:
    """The structures whose channels have the largest weights in the projection: a choice that needs no samples."""
    weight = module.get_submodule(inner.projection).weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return torch.arange(count)
    energy = weight.detach().float().square().transpose(0, 1).flatten(1).sum(1)
    return energy.reshape(inner.count, inner.size).sum(1).topk(count).indices.sort().values.cpu()


def own_names(module: nn.Module, inner: Inner) -> tuple[str, ...]:
    """The tensors of a narrowed module that are not its teacher's."""
    parts = (*inner.producers, inner.projection)
    return tuple(f"{part}.{name}" for part in parts for name, _ in module.get_submodule(part).named_parameters())


def narrow_unit(module: ModuleT, share: float) -> ModuleT:
    """A module with a share of its inner width, the largest structures of it. The width must be known (`inner_of`)."""
    inner = inner_of(module)
    assert inner is not None
    return narrowed(module, inner, largest_structures(module, inner, inner.kept(share)))


def _own(root: nn.Module, path: str) -> nn.Module:
    """The part at a path, which with all containers on the way to it becomes the copy's own."""
    here: Any = root
    for name in path.split("."):
        here._modules[name] = shallow_copy(here._modules[name])
        here = here._modules[name]
    here._parameters = dict(here._parameters)
    part: nn.Module = here
    return part


def _select(part: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    old = part._parameters.get(name)
    if old is not None:
        new = old.detach().index_select(dim, keep.to(old.device))
        part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def _tell_widths(part: Any) -> None:
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, nn.Conv2d):
        part.out_channels, part.in_channels = part.weight.shape[:2]
    elif isinstance(part, nn.GroupNorm):
        part.num_channels = len(part.weight)
