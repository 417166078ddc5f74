"""The plans that others would make for a budget: what our search is compared with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch_pruning
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D

from asdm_compress.assembly.in_time import SLACK, TIMING_TOLERANCE
from asdm_compress.assembly.options import Option, teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.search import solve
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.edits import EXACT, has_weights
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.core.units import Limit
from asdm_compress.profiling.profile import Profile

BK_PATTERNS = {
    f"bk-sdm-{size}": Plan(load_recipe(find_recipe(f"bk-sdm-{size}-v1")).as_edits())
    for size in ("base", "small", "tiny")
}

PRUNED_SHARES = tuple(i / 16 for i in range(1, 16))


def without_weights(options: Sequence[Option]) -> list[Option]:
    """What can only be taken out."""
    return [o for o in options if not has_weights(o.edit) and o.edit not in EXACT]


def knapsack(options: Sequence[Option], damages: Mapping[str, float], profile: Profile, share: float) -> Plan | None:
    """LAPTOP-Diff's idea (2404.11098): whole layers and units, additive one-shot damages, solved exactly."""
    whole = [o for o in without_weights(options) if ".transformer_blocks." not in o.site]
    return _solved(whole, damages, profile, share)


def _solved(options: Sequence[Option], damages: Mapping[str, float], profile: Profile, share: float) -> Plan | None:
    try:
        return solve(options, damages, teacher_costs(profile), [Limit("latency", share, True)]).plan
    except AsdmError:
        return None


def greedy(options: Sequence[Option], damages: Mapping[str, float], profile: Profile, share: float) -> Plan | None:
    """Edits in the order of damage per second saved until the budget is met, without those that are then not needed."""
    useful = [o for o in without_weights(options) if o.savings["latency"] > 0]
    order = sorted(useful, key=lambda o: damages[o.name] / o.savings["latency"])
    plan = _taken(order, profile, share)
    if plan is None:
        return None
    chosen = sorted((o for o in order if plan.edits.get(o.site) == o.edit), key=lambda o: damages[o.name], reverse=True)
    spare = sum(o.savings["latency"] for o in chosen) - (1 - share) * profile.latency
    kept = []
    for option in chosen:
        if option.savings["latency"] <= spare:
            spare -= option.savings["latency"]
        else:
            kept.append(option)
    return Plan({o.site: o.edit for o in kept})


def random_plans(options: Sequence[Option], profile: Profile, share: float, count: int, seed: int) -> Iterator[Plan]:
    """Edits in a random order until the budget is met."""
    chance = random.Random(seed)
    useful = [o for o in without_weights(options) if o.savings["latency"] > 0]
    made = 0
    for _ in range(20 * count):
        order = chance.sample(useful, len(useful))
        plan = _taken(order, profile, share)
        if plan is not None:
            made += 1
            yield plan
        if made == count:
            return


def _taken(order: Sequence[Option], profile: Profile, share: float) -> Plan | None:
    missing, taken, touched = (1 - share) * profile.latency, {}, set[str]()
    for option in order:
        if missing <= 0:
            break
        if touched.isdisjoint(option.atoms):
            taken[option.site] = option.edit
            touched |= option.atoms
            missing -= option.savings["latency"]
    return Plan(taken) if missing <= 0 else None


def within_measured(
    make: Callable[[float], Plan | None],
    share: float,
    ratio_of: Callable[[UNet2DConditionModel], float],
    teacher: UNet2DConditionModel,
    rounds: int = 8,
) -> tuple[Plan, float] | None:
    """A maker's plan whose measured latency ratio keeps the budget and leaves little of it, as our own search has it.

    What is asked of the maker is lowered where its plan is measured to be too slow, and raised again, half-way to what
    was too slow, where it is faster than need be. Of those that keep the budget, the one of which least was asked.
    """
    asked, too_much = share, 0.0  # the most that is known to be too slow, 0 for none
    best: tuple[float, Plan, float] | None = None
    for _ in range(rounds):
        plan = make(asked)
        if plan is None:
            break
        ratio = ratio_of(assemble(teacher, plan))
        if ratio > share * (1 + TIMING_TOLERANCE):
            too_much = min(too_much or asked, asked)
            lower = asked * min(1 - TIMING_TOLERANCE, share / ratio)
            asked = (best[0] + asked) / 2 if best else lower
            continue
        if best is None or asked > best[0]:
            best = asked, plan, ratio
        if ratio >= share * (1 - SLACK):
            break
        asked = (asked + too_much) / 2 if too_much else min(1.0, asked * share / ratio)
    return None if best is None else (best[1], best[2])


def torch_pruned(unet: UNet2DConditionModel, ratio: float, text_tokens: int) -> UNet2DConditionModel:
    """A UNet with a share of all its widths pruned by torch-pruning, by magnitude, as its own examples do it.

    The widths that diffusers keep in attributes are corrected afterwards.
    """
    pruned = copy.deepcopy(unet).requires_grad_(True)
    attentions = [module for module in pruned.modules() if isinstance(module, Attention)]
    size = unet.config["sample_size"]
    sample = torch.randn(2, unet.config["in_channels"], size, size, device=unet.device)
    text = torch.randn(2, text_tokens, unet.config["cross_attention_dim"], device=unet.device)
    torch_pruning.pruner.BasePruner(
        pruned,
        example_inputs=(sample, torch.tensor(500, device=unet.device), text),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[pruned.conv_out, pruned.time_embedding],
        num_heads={part: a.heads for a in attentions for part in (a.to_q, a.to_k, a.to_v)},
        prune_head_dims=True,
    ).step()
    for attention in attentions:
        attention.inner_dim, attention.inner_kv_dim = attention.to_q.out_features, attention.to_k.out_features
    for module in pruned.modules():
        if isinstance(module, (Downsample2D, Upsample2D)):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
    return pruned.eval().requires_grad_(False)


def pruned_ratios(
    unet: UNet2DConditionModel, ratio_of: Callable[[UNet2DConditionModel], float], text_tokens: int
) -> dict[float, float]:
    """The measured latency ratio of `torch_pruned` for every pruned share."""
    return {share: ratio_of(torch_pruned(unet, share, text_tokens)) for share in PRUNED_SHARES}
