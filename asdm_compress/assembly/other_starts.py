"""Starts of slot convolutions that need no samples: copies of kept kernels, and random ones; zero is the default.

They are what a training would start from without the closed-form fit of `slot_start`.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.assembly.plan import Plan, place
from asdm_compress.models.edits import SlotWeights, edited_copy, slot_of
from asdm_compress.models.expert_conv import MultiExpertConv2d


@torch.no_grad()
def copied_start(unet: UNet2DConditionModel, plan: Plan) -> SlotWeights:
    """Cross-layer weights: every expert is a copy of a kept convolution of its shape, the nearest ones first.

    Slots whose shape no kept convolution has, and factorised ones, stay at zero.
    """
    placed = place(unet, plan)
    student = edited_copy(unet, placed.units)
    gone: tuple[str, ...] = ("mid_block",) if placed.drop_mid else ()
    if placed.keep_levels is not None:
        keep, count = placed.keep_levels, len(unet.down_blocks)
        gone += tuple(f"down_blocks.{i}." for i in range(keep, count))
        gone += tuple(f"up_blocks.{i}." for i in range(count - keep))
        gone += (f"down_blocks.{keep - 1}.downsamplers",)
    modules = ((path, module) for path, module in student.named_modules() if not path.startswith(gone or ("-",)))
    paths = [path for path, module in modules if isinstance(module, nn.Conv2d)]
    order = {path: i for i, (path, _) in enumerate(unet.named_modules())}
    weights = {}
    for unit in placed.bearers:
        layer = slot_of(student, unit)
        state = layer.state_dict()
        nearest = sorted(paths, key=lambda path: abs(order[path] - order[unit]))
        for expert, source in enumerate(_sources(student, layer, nearest)):
            state["weights.0"][expert] = source.weight
            if source.bias is not None:
                state["bias"][expert] = source.bias
        weights[unit] = state
    return weights


def _sources(student: nn.Module, layer: MultiExpertConv2d, paths: list[str]) -> list[nn.Conv2d]:
    """One convolution for every expert; none at all where no shape fits."""
    if len(layer.weights) > 1:
        return []
    convolutions = [student.get_submodule(path) for path in paths]
    shape = layer.weights[0].shape[1:]
    alike = [conv for conv in convolutions if isinstance(conv, nn.Conv2d) and conv.weight.shape == shape]
    return [alike[expert % len(alike)] for expert in range(layer.spec.experts)] if alike else []


@torch.no_grad()
def random_start(unet: UNet2DConditionModel, plan: Plan, seed: int = 0) -> SlotWeights:
    """Kernels from He's normal distribution, biases zero."""
    placed = place(unet, plan)
    student = edited_copy(unet, placed.units)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for unit in placed.bearers:
        layer = slot_of(student, unit)
        for factor in layer.weights:
            _fill(factor, generator)
        weights[unit] = layer.state_dict()
    return weights


def _fill(factor: Tensor, generator: torch.Generator) -> None:
    inputs = factor[0, 0].numel()
    factor.copy_(torch.randn(factor.shape, generator=generator) * (2 / inputs) ** 0.5)
