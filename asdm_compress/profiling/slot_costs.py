"""What convolutions would cost in the slots: measured inside whole passes of a UNet that has them everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.core.edits import ConvSpec
from asdm_compress.models.edits import edited_copy, slot_kernels
from asdm_compress.profiling.profile import ProfileSettings, SiteProfile, profile

SlotCosts = Mapping[ConvSpec, Mapping[str, SiteProfile]]


def as_run(spec: ConvSpec) -> ConvSpec:
    """The convolution that costs the same time: one that is routed by the timestep alone runs as a plain one.

    With the features the timestep's logits are nothing beside the kernels mixed for every image.
    """
    if spec.routing in ("feature", "both"):
        return replace(spec, routing="feature")
    return replace(spec, experts=1, routing="none", mixing="softmax", temperature=1.0)


@torch.no_grad()
def slot_costs(unet: UNet2DConditionModel, specs: Sequence[ConvSpec], settings: ProfileSettings) -> SlotCosts:
    """The costs of every unit's slot with each convolution, by the spec as it runs (see `as_run`).

    `parameters` and `bytes` are those of that spec too. One profile is made per different convolution.
    """
    kernels = slot_kernels(unet)
    costs = {}
    for spec in dict.fromkeys(as_run(spec) for spec in specs):
        paths = [path for path, sizes in kernels.items() if spec.kernel in sizes]
        everywhere = edited_copy(unet, dict.fromkeys(paths, spec.name))
        found = profile(everywhere, settings)
        costs[spec] = {path: found.site(path) for path in paths}
    return costs
