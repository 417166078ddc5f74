"""What edits cost that put something into a place: measured inside whole passes of a UNet that has them everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.core.edits import EXACT, ConvSpec, Edit, conv_spec, narrow
from asdm_compress.models.edits import edited_copy, legal_edits, slot_kernels
from asdm_compress.models.widths import inner_widths
from asdm_compress.profiling.latency import median_ratio, time_side_by_side
from asdm_compress.profiling.profile import Profile, ProfileSettings, SiteProfile, forward_pass, profile

SlotCosts = Mapping[Edit, Mapping[str, SiteProfile]]


def as_run(edit: Edit) -> Edit:
    """The edit that costs the same time: a convolution that is routed by the timestep alone runs as a plain one.

    With the features the timestep's logits are nothing beside the kernels mixed for every image.
    """
    spec = conv_spec(edit)
    if spec is None:
        return edit
    if spec.routing in ("feature", "both"):
        return replace(spec, routing="feature").name
    return replace(spec, experts=1, routing="none", mixing="softmax", temperature=1.0).name


def places_of(
    unet: UNet2DConditionModel, specs: Sequence[ConvSpec], shares: Sequence[float] = (), exact: bool = True
) -> dict[Edit, tuple[str, ...]]:
    """Every edit that puts something into a place, with the paths of the units and sub-units where it can.

    With `exact`, those too that put the same function there in another form.
    """
    kernels, inner = slot_kernels(unet), inner_widths(unet)
    places = {spec.name: [path for path, sizes in kernels.items() if spec.kernel in sizes] for spec in specs}
    legal = legal_edits(unet) if exact else {}
    places |= {edit: [path for path, edits in legal.items() if edit in edits] for edit in EXACT}
    taken: set[tuple[str, int]] = set()
    for share in shares:
        new = {path: (path, width.kept(share)) for path, width in inner.items() if width.can_narrow(share)}
        places[narrow(share)] = [path for path, mark in new.items() if mark not in taken]
        taken |= set(new.values())
    return {edit: tuple(paths) for edit, paths in places.items() if paths}


@torch.no_grad()
def slot_costs(
    unet: UNet2DConditionModel, places: Mapping[Edit, Sequence[str]], settings: ProfileSettings, costs: Profile
) -> SlotCosts:
    """The costs of every place with each edit, by the edit as it runs (see `as_run`).

    `parameters` and `bytes` are those of that edit too. One profile is made per different one, and the UNet itself is
    timed beside it: latencies are given as they would have been when the UNet's `costs` were measured.
    """
    found: dict[Edit, Mapping[str, SiteProfile]] = {}
    for edit in dict.fromkeys(map(as_run, places)):
        paths = dict.fromkeys(path for other, there in places.items() if as_run(other) == edit for path in there)
        everywhere = edited_copy(unet, dict.fromkeys(paths, edit))
        whole = profile(everywhere, settings)
        passes = [forward_pass(model, settings) for model in (everywhere, unet)]
        ratio = median_ratio(*time_side_by_side(passes, settings.repeats, unet.device))
        drift = ratio * costs.latency / whole.latency
        found[edit] = {path: _at_speed(whole.site(path), drift) for path in paths}
    return found


def _at_speed(site: SiteProfile, factor: float) -> SiteProfile:
    times = {"latency": site.latency * factor, "latency_iqr": site.latency_iqr * factor}
    return site.model_copy(update={**times, "latency_samples": [seconds * factor for seconds in site.latency_samples]})
