"""Stable Diffusion 1.5 with random weights: predicted times of schedules that switch, skip and inherit, and their own.

    python tools/bench_switching_full_size.py                   # 512 pixels, alone on the machine
    python tools/bench_switching_full_size.py --size 128        # the same UNets on smaller latents

Which schedule would be chosen depends on weights that were not at hand; whether its time comes out as predicted does
not. Predicted are schedules of every kind, from what single steps of each option take. The members are the UNet and
BK-SDM-Small's cut of it. Writes tools/results/switching_full_size.json.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import StableDiffusionPipeline
from measuring import measured

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.evaluation import intervals
from asdm_compress.inheritance.actions import Action, cut
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.loading import load_pipeline, load_unet
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.latency import time_side_by_side
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.switch_times import SKIP, time_options
from asdm_compress.scheduling.timing import Loop
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel

MODEL, RECIPE, TOKENS, STEPS = "sd15", "bk-sdm-small-v1", 77, 8
TEACHER, STUDENT = Action(member="teacher"), Action(member="student")
CUT = Action(cut(2, LINEAR).inherits, None, "teacher")
ONE_BRANCH = Action((), LINEAR, "student")
SCHEDULES = {
    "the teacher alone": (TEACHER,) * STEPS,
    "small first": (STUDENT,) * 4 + (TEACHER,) * 4,
    "interleaved, with skipped steps": (TEACHER, STUDENT, SKIP, STUDENT, TEACHER, SKIP, STUDENT, TEACHER),
    "with a cut inherited": (TEACHER, CUT, STUDENT, TEACHER, CUT, CUT, STUDENT, STUDENT),
    "everything": (TEACHER, CUT, STUDENT, ONE_BRANCH, SKIP, TEACHER, CUT, ONE_BRANCH),
}


def main() -> None:
    """Time single steps, predict, and time whole runs in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels per side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    with measured("switching_full_size", __doc__) as bench, torch.no_grad():
        dtype = getattr(torch, arguments.dtype)
        teacher = load_unet(MODEL, LoadOptions(dtype=dtype, random_weights=True))
        student = assemble(teacher, Plan(load_recipe(find_recipe(RECIPE)).as_edits()))
        parts = load_pipeline("mini-sd", LoadOptions(dtype=dtype)).components
        pipeline = StableDiffusionPipeline(**{**parts, "unet": teacher}, requires_safety_checker=False)
        timeline = sampler_timeline(pipeline, STEPS)
        made = SwitchingSchedule((TEACHER,) * STEPS, timeline.timesteps, noise_of(pipeline.scheduler))
        pipeline.unet = SwitchedUNet2DConditionModel.of({"teacher": teacher, "student": student}, made)
        texts = torch.randn(1, 2, TOKENS, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
        sampling = SamplingSettings(STEPS, 7.5, 0, arguments.size)
        options = tuple(dict.fromkeys(action for schedule in SCHEDULES.values() for action in schedule))
        times = time_options(pipeline, options, texts, sampling, arguments.repeats)
        loops = [Loop(pipeline, texts, sampling, Schedule(actions)) for actions in SCHEDULES.values()]
        samples = time_side_by_side(loops, arguments.repeats, pipeline.device)
        for (name, actions), seconds in zip(SCHEDULES.items(), samples, strict=True):
            predicted, own = times.run(actions), intervals.median(seconds)
            share = intervals.median_ratio(samples[0], seconds)
            bench.add(
                {
                    "schedule": name, "size": arguments.size, "dtype": arguments.dtype, "steps": len(actions),
                    "predicted": predicted, "measured": own, "off": own.value / predicted - 1,
                    "predicted_share": predicted / times.run(SCHEDULES["the teacher alone"]), "measured_share": share,
                    "share_off": share.value * times.run(SCHEDULES["the teacher alone"]) / predicted - 1,
                }
            )  # fmt: skip


if __name__ == "__main__":
    main()
