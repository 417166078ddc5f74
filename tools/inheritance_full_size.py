"""Schedules of feature inheritance at the size of Stable Diffusion 1.5: what they hold, and their time as predicted
and as measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measuring import RESULTS, fingerprint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asdm_compress.inheritance.actions import FULL, Action, conditional_only, cut, skip
from asdm_compress.inheritance.costs import counts_alike, run_macs
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.forecast import HOLD, LINEAR
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall
from asdm_compress.models.families import FAMILIES, random_unet
from asdm_compress.profiling.counting import ModuleCounts, count
from asdm_compress.profiling.latency import median_ratio
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.menu import Kind, kind_of, menu_of
from asdm_compress.scheduling.timing import Loop, time_kinds, time_runs


@functools.cache
def _on_meta() -> tuple[Evaluator, UNetCall, ModuleCounts, ModuleCounts]:
    """The UNet of SD 1.5 in half precision, a guided call of it, and what that and half of it count."""
    family = FAMILIES["sd15"].unet_config
    rows, size, tokens = 2, int(family["sample_size"]), 77
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family).half()
        sample = torch.empty(rows, 4, size, size, dtype=torch.half)
        text = torch.empty(rows, tokens, family["cross_attention_dim"], dtype=torch.half)
        call = UNetCall(sample, torch.empty(()), text)
    return Evaluator(unet), call, count(unet, rows, size, size, tokens), count(unet, 1, size, size, tokens)


@torch.no_grad()
def on_paper(actions: Sequence[Action]) -> dict[str, Any]:
    """The most MiB per sample that a guided run of these actions holds at the size of SD 1.5 in half precision, and its
    MACs as planned and as executed. It runs on the meta device, which goes through every operation and computes none.
    """
    evaluator, call, *counts = _on_meta()
    # Any σs that fall do: neither what is held nor what is computed depends on them.
    levels = tuple(float(x) for x in np.geomspace(14, 0.03, len(actions)))
    timeline = Timeline(tuple(float(len(actions) - i) for i in range(len(actions))), levels)
    run, most = Run(evaluator, actions, timeline, guided=True), 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        while not run.finished:
            run.evaluate(call)
            most = max(most, run.held_bytes)
    return {
        "sd15_mib_per_sample": round(most / len(call.sample) / 2**20, 3),
        "sd15_planned_macs": sum(run_macs(evaluator.plan(actions, timeline, guided=True), counts_alike(*counts))),
        "sd15_executed_macs": counter.get_total_flops() // 2,
    }


@torch.no_grad()
def full_size(repeats: int, steps: int = 8) -> dict[str, Any]:
    """Predicted and measured time of two mixed schedules on a UNet of SD 1.5's size with random bfloat16 weights."""
    unet = random_unet(FAMILIES["sd15"], torch.bfloat16, torch.device("cpu"))
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = StableDiffusionPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    texts = torch.zeros(1, 2, 77, unet.config["cross_attention_dim"], dtype=unet.dtype)
    settings = SamplingSettings(steps, 5.0)
    light, deep = cut(0, LINEAR), cut(2, LINEAR)
    mixed = {
        "cut.0 and full": (FULL, FULL, light, light, FULL, light, light, light),
        "everything": (FULL, FULL, light, conditional_only(LINEAR), skip(LINEAR), deep, FULL, light),
    }
    menu = menu_of(unet, (skip(), cut(0), cut(2)), (HOLD, LINEAR), True)
    kinds: list[Kind] = list(dict.fromkeys(kind_of(menu, a) for actions in mixed.values() for a in actions))
    times = time_kinds(pipeline, menu, kinds, texts, settings, repeats)
    loops = {name: Loop(pipeline, texts, settings, Schedule(actions)) for name, actions in mixed.items()}
    full, *others = time_runs([Loop(pipeline, texts, settings), *loops.values()], repeats)
    rows = []
    for (name, actions), seconds in zip(mixed.items(), others, strict=True):
        predicted = times.outside + sum(times.seconds[kind_of(menu, action)] for action in actions)
        measured = median_ratio(seconds, full)
        row = {"schedule": name, "predicted_share": predicted / times.full_run, "share": measured}
        rows.append(row | {"off": predicted / times.full_run / measured - 1} | on_paper(actions))
    return {
        "machine": fingerprint(),
        "steps": steps,
        "repeats": repeats,
        "full_seconds": sorted(full)[len(full) // 2],
        "rows": rows,
    }


def add_full_size(repeats: int) -> None:
    """Measure at the size of Stable Diffusion 1.5, and write it."""
    found = full_size(repeats)
    print(json.dumps(found), flush=True)
    (RESULTS / "inheritance_full_size.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
