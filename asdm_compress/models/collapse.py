"""Timestep experts turned into fixed kernels: one for all steps, or one for every step of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.core.edits import ConvSpec, conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.edits import slot_of
from asdm_compress.models.expert_conv import TRAIN_TIMESTEPS, Moment, MultiExpertConv2d
from asdm_compress.models.signatures import own_config

LEAST_LEAD: Final = 20.0  # of a step's own kernel over the next one's, as a logit


@torch.no_grad()
def collapse_experts(
    student: AssembledUNet2DConditionModel, timesteps: Sequence[float], per_step: bool
) -> AssembledUNet2DConditionModel:
    """A student whose timestep-routed convolutions are fixed, for a sampler that visits these timesteps.

    With `per_step` every step gets a kernel of its own, which changes nothing at these steps; without, all get the mean
    of the steps' kernels, of factorised ones the nearest that two factors make, and nothing is routed any more. Raises
    AsdmError for a student that has nothing to collapse, and for convolutions that are routed by the features.
    """
    edits = dict(student.config["edits"] or {})
    routed = {path: spec for path, edit in edits.items() if (spec := conv_spec(edit)) is not None and spec.experts > 1}
    if not routed:
        raise AsdmError("this student has no experts to collapse")
    bound = [path for path, spec in routed.items() if spec.routing != "timestep"]
    if bound:
        raise AsdmError(f"the experts at {bound[0]} are routed by the features: no fixed kernel does the same")
    steps = torch.tensor(sorted({float(t) for t in timesteps}, reverse=True))
    experts = len(steps) if per_step else 1
    new = {
        path: replace(spec, experts=experts, routing="timestep" if experts > 1 else "none", mixing="softmax",
                      temperature=1.0)
        for path, spec in routed.items()
    }  # fmt: skip
    config = own_config(student, UNet2DConditionModel)
    names = {**edits, **{path: spec.name for path, spec in new.items()}}
    with torch.device("meta"):
        twin: AssembledUNet2DConditionModel = AssembledUNet2DConditionModel(**config, edits=names)
    state = student.state_dict()
    for path, spec in new.items():
        prefix = f"{path}.slot."
        state = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
        fixed = _fixed(slot_of(student, path), spec, steps)
        state |= {prefix + name: tensor for name, tensor in fixed.items()}
    twin.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, strict=True, assign=True)
    twin.eval().requires_grad_(False)
    return twin


def _fixed(layer: MultiExpertConv2d, spec: ConvSpec, steps: Tensor) -> dict[str, Tensor]:
    """The state of a slot with the kernels of `steps`, or with their mean."""
    shares = layer.route(None, Moment(steps.to(layer.bias.device)))
    mixed = [layer.kernels_for(share) for share in shares]
    factors = [torch.stack([kernels[i] for kernels, _ in mixed]) for i in range(len(layer.weights))]
    bias = torch.stack([b for _, b in mixed])
    twin = MultiExpertConv2d(layer.in_channels, layer.out_channels, spec).to(bias)
    if spec.experts == 1:
        factors, bias = _mean_kernels(factors, spec), bias.mean(0, keepdim=True)
    for weight, factor in zip(twin.weights, factors, strict=True):
        weight.copy_(factor)
    twin.bias.copy_(bias)
    if twin.time_router is not None:
        boundaries = (steps[:-1] + steps[1:]) / 2 / TRAIN_TIMESTEPS
        twin.time_router.boundaries.copy_(boundaries)
        # Steps may lie so close that the usual transition would reach into the next one's kernel.
        gap = float((steps[:-1] - steps[1:]).min()) / 2 / TRAIN_TIMESTEPS
        own = twin.time_router.sharpness
        sharpest = torch.tensor(min(LEAST_LEAD / max(gap, 1e-6), torch.finfo(own.dtype).max / 2)).to(own)
        twin.time_router.sharpness.copy_(torch.maximum(twin.time_router.sharpness, sharpest))
    return twin.state_dict()


def _mean_kernels(factors: Sequence[Tensor], spec: ConvSpec) -> list[Tensor]:
    """The factors of the mean of several kernels, each factor (K, …); factors of their own mean nothing one by one."""
    if len(factors) == 1:
        return [factors[0].mean(0, keepdim=True)]
    first, second = (factor.double() for factor in factors)
    kernel, mix = first.shape[-2:], second.flatten(2)  # (K, outputs, middle)
    if spec.separable:
        # Of every input channel the best single pattern for the mean of its kernels.
        dense = torch.einsum("koc,kcp->cop", mix, first.flatten(2)) / len(first)
        left, scale, right = torch.linalg.svd(dense, full_matrices=False)
        patterns, shares = right[:, 0], (left[:, :, 0] * scale[:, :1]).T  # (C, kk) and (outputs, C)
    else:
        dense = torch.einsum("kor,krp->op", mix, first.flatten(2)) / len(first)
        left, scale, right = torch.linalg.svd(dense, full_matrices=False)
        rank = first.shape[1]
        patterns, shares = right[:rank], left[:, :rank] * scale[:rank]
    found = (patterns.reshape(1, *first.shape[1:-2], *kernel), shares[None, :, :, None, None])
    return [part.to(factor) for part, factor in zip(found, factors, strict=True)]
