"""What the run time of feature inheritance costs by itself, and what it holds.

    python tools/bench_inheritance_overhead.py          # alone; writes tools/results/inheritance_overhead.json
    python tools/bench_inheritance_overhead.py --small  # without the full-size rows

Whole calls of pipelines that compute everything, in turns with the plain pipeline: on `mini-sd`, and on a UNet of the
size of Stable Diffusion 1.5 with random bfloat16 weights at 512 x 512. The time that is the run time's own is spent on
the processor and does not grow with the widths: on `mini-sd`, which has as many layers, it stands out of the noise and
is given in microseconds per step, and also as a share of a full-size step. In one thread, seconds are that thread's
own. Bytes held are those of a run on the meta device at full size, which computes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measuring import Bench, measured

from asdm_compress.inheritance.actions import graph_for
from asdm_compress.inheritance.attach import enable
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.places import find_places
from asdm_compress.inheritance.program import program_of
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall
from asdm_compress.models.families import FAMILIES, random_unet
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.models.tree import sharing_copy
from asdm_compress.profiling.latency import median_ratio, time_side_by_side

SMALL_STEPS, SMALL_REPEATS = 10, 41
FULL_STEPS, FULL_REPEATS = 2, 7
MIB = 2**20
DEEPCACHE_MIB = 54  # per sample, version 0.1.1 with SD 1.5 in half precision, whatever the branch
HELD = (
    "uniform:3,branch=0,forecast=hold",
    "uniform:3,branch=0",
    "uniform:3,branch=2,forecast=hold",
    "uniform:3,branch=2",
    "uniform:3,branch=0,guidance=2",
)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    small_only = parser.parse_args().small
    with measured("inheritance_overhead", __doc__) as bench:
        measure(bench, small_only)


def measure(bench: Bench, small_only: bool) -> None:
    """What a run that computes everything takes more, and what runs hold."""
    content = bench.facts
    small = load_pipeline("mini-sd", LoadOptions()).unet
    content["mini-sd"] = _overhead(small, 16, SMALL_STEPS, SMALL_REPEATS)
    print(json.dumps(content["mini-sd"]), flush=True)
    if not small_only:
        family = FAMILIES["sd15"]
        full = random_unet(family, torch.bfloat16, torch.device("cpu"))
        row = _overhead(full, family.unet_config["sample_size"], FULL_STEPS, FULL_REPEATS)
        for name in ("whole", "recording"):
            own = content["mini-sd"][f"{name}_microseconds_per_step"] * 1e-6
            row[f"{name}_share_of_a_step"] = round(own / row["plain_seconds_per_step"], 6)
        content["sd15 bf16"] = row
        print(json.dumps(row), flush=True)
    content["held"] = [_held(rule) for rule in HELD]
    content["deepcache_mib_per_sample"] = DEEPCACHE_MIB
    print(json.dumps(content["held"]), flush=True)


@torch.no_grad()
def _overhead(unet: UNet2DConditionModel, size: int, steps: int, repeats: int) -> dict[str, Any]:
    """Calls of a pipeline that is not enabled, and of one that is and computes everything; and single passes of the
    UNet, by itself and layer by layer with a feature recorded."""
    plain, enabled = _pipeline(sharing_copy(unet)), _pipeline(unet)
    enable(enabled, "uniform:1")
    text = torch.zeros(1, 77, unet.config["cross_attention_dim"], dtype=unet.dtype)
    start = torch.zeros(1, unet.config["in_channels"], size, size, dtype=unet.dtype)

    def sampling(pipeline: StableDiffusionPipeline) -> Callable[[], object]:
        return lambda: pipeline(
            prompt_embeds=text, negative_prompt_embeds=text, latents=start, num_inference_steps=steps,
            guidance_scale=5.0, output_type="latent",
        )  # fmt: skip

    call = UNetCall(start.repeat(2, 1, 1, 1), torch.tensor(500), text.repeat(2, 1, 1))
    evaluator, places = Evaluator(unet), find_places(unet)
    light = parse_mode("uniform:2").light
    program = program_of(graph_for(unet, places, [light]), (), places[light.inherits[0].place].outputs)
    cpu = torch.device("cpu")
    runs = time_side_by_side([sampling(plain), sampling(enabled)], repeats, cpu, undisturbed=True)
    passes = time_side_by_side(
        [lambda: plain.unet(**call.arguments()), lambda: evaluator.evaluate(program, call)],
        repeats, cpu, undisturbed=True,
    )  # fmt: skip
    own = [(b - a) / steps for a, b in zip(*runs, strict=True)]
    recording = [b - a for a, b in zip(*passes, strict=True)]
    return {
        "latent_size": size,
        "steps": steps,
        "turns": len(runs[0]),
        "plain_seconds_per_step": round(median(runs[0]) / steps, 6),
        "whole_ratio": round(median_ratio(runs[1], runs[0]), 5),
        "whole_microseconds_per_step": round(1e6 * median(own), 1),
        "recording_ratio": round(median_ratio(passes[1], passes[0]), 5),
        "recording_microseconds_per_step": round(1e6 * median(recording), 1),
    }


def _pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """One that takes embeddings and gives latents, so that only the UNet and the scheduler run."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        **parts, unet=unet, scheduler=DDIMScheduler(clip_sample=False), requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _held(rule: str, steps: int = 20) -> dict[str, Any]:
    """The most that a guided run holds between two steps, per sample of its batch, in half precision."""
    config = FAMILIES["sd15"].unet_config
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).half()
        rows = 2
        sample = torch.empty(rows, 4, config["sample_size"], config["sample_size"], dtype=torch.half)
        call = UNetCall(sample, torch.empty(()), torch.empty(rows, 77, config["cross_attention_dim"], dtype=torch.half))
        timeline = Timeline(tuple(float(t) for t in range(1000, 0, -1000 // steps)))
        run = Run(Evaluator(unet), parse_mode(rule).actions(len(timeline)), timeline, guided=True)
        most = 0
        while not run.finished:
            run.evaluate(call)
            most = max(most, run.held_bytes)
    return {"rule": rule, "mib_per_sample": round(most / rows / MIB, 3), "after_the_end": run.held_bytes}


if __name__ == "__main__":
    main()
