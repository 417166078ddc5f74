"""Sites: the named places of a UNet at which it is measured and edited, at four levels of detail.

A path is the module's own path (`up_blocks.1.resnets.2`); two kinds of places have no module of their own and get a
path in the same style: a layer (`down_blocks.0.layers.1`) and the projections around a transformer's blocks
(`….attentions.0.projections`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from diffusers import UNet2DConditionModel
from torch import nn

SiteLevel = Literal["block", "layer", "unit", "sub-unit"]
SiteKind = Literal[
    "stem", "time", "block", "mid", "head", "layer", "resnet", "transformer", "downsampler", "upsampler",
    "projections", "self-attention", "cross-attention", "feed-forward", "shortcut", "resampling-convolution",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """A place: `modules` are the paths of the modules that make it up, in the order in which they run."""

    path: str
    level: SiteLevel
    kind: SiteKind
    parent: str | None
    modules: tuple[str, ...]


def find_sites(unet: UNet2DConditionModel) -> tuple[Site, ...]:
    """All sites in the order in which they run, each parent before its children."""
    return tuple(_sites(unet))


def _sites(unet: UNet2DConditionModel) -> Iterator[Site]:
    yield Site("time_embedding", "block", "time", None, ("time_proj", "time_embedding"))
    yield Site("conv_in", "block", "stem", None, ("conv_in",))
    for i, block in enumerate(unet.down_blocks):
        yield from _block_sites(f"down_blocks.{i}", block, "block")
    if unet.mid_block is not None:
        yield from _mid_sites(unet.mid_block)
    for i, block in enumerate(unet.up_blocks):
        yield from _block_sites(f"up_blocks.{i}", block, "block")
    yield Site("conv_out", "block", "head", None, ("conv_norm_out", "conv_act", "conv_out"))


def _block_sites(path: str, block: nn.Module, kind: SiteKind) -> Iterator[Site]:
    yield Site(path, "block", kind, None, (path,))
    attentions = modules_of(block, "attentions")
    for j in range(len(modules_of(block, "resnets"))):
        units = [f"{path}.resnets.{j}"] + ([f"{path}.attentions.{j}"] if j < len(attentions) else [])
        layer = f"{path}.layers.{j}"
        yield Site(layer, "layer", "layer", path, tuple(units))
        yield from _resnet_sites(units[0], block.get_submodule(f"resnets.{j}"), layer)
        if j < len(attentions):
            yield from _transformer_sites(units[1], attentions[j], layer)
    for name, sampler_kind in (("downsamplers", "downsampler"), ("upsamplers", "upsampler")):
        for j in range(len(modules_of(block, name))):
            sampler = f"{path}.{name}.{j}"
            yield Site(sampler, "unit", sampler_kind, path, (sampler,))  # type: ignore[arg-type]
            if hasattr(block.get_submodule(f"{name}.{j}"), "conv"):
                yield Site(f"{sampler}.conv", "sub-unit", "resampling-convolution", sampler, (f"{sampler}.conv",))


def _mid_sites(mid: nn.Module) -> Iterator[Site]:
    yield Site("mid_block", "block", "mid", None, ("mid_block",))
    attentions = modules_of(mid, "attentions")
    for j in range(len(modules_of(mid, "resnets"))):
        # The mid block starts with a lone ResNet; every further layer is a transformer followed by a ResNet.
        with_attention = 0 < j <= len(attentions) and attentions[j - 1] is not None
        units = ([f"mid_block.attentions.{j - 1}"] if with_attention else []) + [f"mid_block.resnets.{j}"]
        layer = f"mid_block.layers.{j}"
        yield Site(layer, "layer", "layer", "mid_block", tuple(units))
        if with_attention:
            yield from _transformer_sites(units[0], attentions[j - 1], layer)
        yield from _resnet_sites(units[-1], mid.get_submodule(f"resnets.{j}"), layer)


def _resnet_sites(path: str, resnet: nn.Module, layer: str) -> Iterator[Site]:
    yield Site(path, "unit", "resnet", layer, (path,))
    if getattr(resnet, "conv_shortcut", None) is not None:
        yield Site(f"{path}.conv_shortcut", "sub-unit", "shortcut", path, (f"{path}.conv_shortcut",))


def _transformer_sites(path: str, transformer: nn.Module, layer: str) -> Iterator[Site]:
    yield Site(path, "unit", "transformer", layer, (path,))
    if not hasattr(transformer, "transformer_blocks"):
        return  # what a plan has put in its place
    frame = (f"{path}.norm", f"{path}.proj_in", f"{path}.proj_out")
    yield Site(f"{path}.projections", "sub-unit", "projections", path, frame)
    parts: tuple[tuple[str, str, SiteKind], ...] = (
        ("norm1", "attn1", "self-attention"),
        ("norm2", "attn2", "cross-attention"),
        ("norm3", "ff", "feed-forward"),
    )
    for k, block in enumerate(modules_of(transformer, "transformer_blocks")):
        inside = f"{path}.transformer_blocks.{k}"
        for norm, part, kind in parts:
            if getattr(block, part, None) is not None:
                yield Site(f"{inside}.{part}", "sub-unit", kind, path, (f"{inside}.{norm}", f"{inside}.{part}"))


def modules_of(block: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a block's list `name`; empty where the block has no such list."""
    found = getattr(block, name, None)
    return list(found) if found is not None else []
