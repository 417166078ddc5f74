"""Full-size Stable Diffusion on an accelerator, eager and compiled: plans and schedules, predicted and measured.

    python tools/bench_gpu.py                                   # cuda, fp16, SD 1.5 and 2.1; alone on the machine
    python tools/bench_gpu.py --models sd15 --modes eager       # a part of it
    python tools/bench_gpu.py --device cpu --dtype fp32 --width 32 --size 128 --steps 4 --repeats 2 --out trial

Random weights: this is about time alone. Timed beside the teacher, in turns: one pass (one image with guidance) of
BK-SDM's students and of our recipes, and the sampling loop under our schedules and under DeepCache 0.1.1 where it is
installed. What is predicted is predicted as users are told: plans from the teacher's profile, which is eager, schedules
from the seconds of their kinds of step, measured in the same mode. Writes tools/results/gpu.json. Without an
accelerator it says so and does nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measuring import RESULTS, Bench, in_turns, measured
from rival_packages import DEEPCACHE, deepcache, has

from asdm_compress.assembly.options import find_options, teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.search import costs_of
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.recipe import bundled_recipes, load_recipe
from asdm_compress.inheritance.actions import cut, skip
from asdm_compress.inheritance.forecast import HOLD, LINEAR
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.models.families import FAMILIES, Family, architecture, random_unet
from asdm_compress.profiling.profile import Profile, ProfileSettings, forward_pass, profile
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.menu import kind_of, menu_of
from asdm_compress.scheduling.timing import Loop, time_kinds

MODES = ("eager", "compiled")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RULES = ("uniform:2,branch=0", "uniform:3,branch=0", "uniform:5,branch=0", "uniform:3,branch=2", "uniform:2,guidance=2")
DEEPCACHE_SETTINGS = ((2, 0), (3, 0), (5, 0), (3, 2))
TOKENS, GUIDANCE = 77, 7.5
FULL_WIDTH = 320
RECOMPILED = 64  # forms of one call that are compiled


def family_of(name: str, width: int) -> Family:
    """A named model's UNet, or one of its shape that is narrower, to try the bench out."""
    family = FAMILIES[name]
    if width == FULL_WIDTH:
        return family
    config = dict(family.unet_config)
    config["block_out_channels"] = tuple(value * width // FULL_WIDTH for value in config["block_out_channels"])
    if not isinstance(config["attention_head_dim"], int):
        config["attention_head_dim"] = tuple(max(value // 64, 1) for value in config["block_out_channels"])
    return replace(family, unet_config=config)


def plans_of(name: str, teacher: UNet2DConditionModel) -> Iterator[tuple[str, Plan]]:
    """BK-SDM's recipes and ours that are made for a model; the width does not matter to which places they name."""
    free = {"block_out_channels", "attention_head_dim"}
    own = {key: value for key, value in architecture(teacher).items() if key not in free}
    for stem, path in bundled_recipes().items():
        recipe = load_recipe(path)
        made_for = {key: value for key, value in recipe.base.architecture.items() if key not in free}
        ours = recipe.base.model == name and "latency" in stem
        if (ours or stem.startswith("bk-sdm")) and all(own.get(key) == value for key, value in made_for.items()):
            yield stem, Plan(recipe.as_edits())


def predicted_ratio(teacher: UNet2DConditionModel, plan: Plan, costs: Profile) -> float | None:
    """What a plan's pass takes of the teacher's by the profile; None where it brings convolutions along."""
    options = {(option.site, option.edit): option for option in find_options(teacher, costs)}
    chosen = [options.get(edit) for edit in plan.edits.items()]
    known = [option for option in chosen if option is not None]
    return None if len(known) < len(chosen) else costs_of(known, teacher_costs(costs))["latency"] / costs.latency


def time_plans(bench: Bench, model: str, mode: str, teacher: UNet2DConditionModel, options: argparse.Namespace) -> None:
    """A pass of every student beside the teacher's."""
    settings = ProfileSettings(options.size, text_tokens=TOKENS, repeats=options.repeats)
    costs = profile(assemble(teacher, Plan({})), settings, model)
    for name, plan in plans_of(model, teacher):
        student = assemble(teacher, plan)
        predicted = predicted_ratio(teacher, plan, costs)
        if mode == "compiled":
            student.compile()
        passes = {"teacher": forward_pass(teacher, settings), "student": forward_pass(student, settings)}
        turns = in_turns(passes, options.repeats, bench.device)
        bench.add(
            {
                "model": model, "mode": mode, "what": "plan", "name": name, "predicted": predicted,
                "share": turns.ratio("student", "teacher"), "seconds": turns.median("student"),
                "teacher_seconds": turns.median("teacher"),
            }
        )  # fmt: skip


def time_schedules(
    bench: Bench, model: str, mode: str, teacher: UNet2DConditionModel, options: argparse.Namespace
) -> None:
    """The sampling loop of one image under every rule, and under DeepCache, beside the full one."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        **parts, unet=teacher, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    width = teacher.config["cross_attention_dim"]
    texts = torch.zeros(1, 2, TOKENS, width, dtype=teacher.dtype, device=bench.device)
    settings = SamplingSettings(options.steps, GUIDANCE, 0, options.size)
    full = Loop(pipeline, texts, settings)
    menu = menu_of(teacher, (skip(), cut(0), cut(2)), (HOLD, LINEAR), True)
    actions = {rule: parse_mode(rule).actions(options.steps) for rule in RULES}
    kinds = list(dict.fromkeys(kind_of(menu, action) for run in actions.values() for action in run))
    times = time_kinds(pipeline, menu, kinds, texts, settings, max(3, options.repeats // 3))
    for rule, run in actions.items():
        seconds = times.outside + sum(times.seconds[kind_of(menu, action)] for action in run)
        loop = Loop(pipeline, texts, settings, parse_mode(rule))
        _add_loop(bench, full, loop, options.repeats, {"model": model, "mode": mode, "what": "schedule", "name": rule,
                                                       "predicted": seconds / times.full_run})  # fmt: skip
    for interval, branch in DEEPCACHE_SETTINGS if has(DEEPCACHE) else ():
        (setting,) = deepcache((interval,), (branch,))
        row = {"model": model, "mode": mode, "what": "DeepCache", "name": setting.name, "predicted": None}
        try:
            # Its copy is made of a teacher that is not compiled, and is compiled once it is patched.
            pipeline.unet = assemble(teacher, Plan({}))
            loop = setting.loop(pipeline, texts, settings)
            if mode == "compiled":
                loop.pipeline.unet.compile()
            _add_loop(bench, full, loop, options.repeats, row)
        except Exception as error:  # the package's own
            bench.add(row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        finally:
            pipeline.unet = teacher


def _add_loop(bench: Bench, full: Loop, loop: Loop, repeats: int, row: dict[str, Any]) -> None:
    with torch.no_grad():
        turns = in_turns({"full": full, "other": loop}, repeats, bench.device)
    bench.add(
        row
        | {
            "share": turns.ratio("other", "full"),
            "seconds": turns.median("other"),
            "teacher_seconds": turns.median("full"),
        }
    )


def main(words: list[str] | None = None) -> None:
    """Every model in every mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("sd15", "sd21-base", "sd21"), default=["sd15", "sd21-base"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--width", type=int, default=FULL_WIDTH, help="of the highest level; fewer try this out")
    parser.add_argument("--size", type=int, help="pixels per side; by default the model's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.json")
    options = parser.parse_args(words)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no accelerator here; --device cpu --width 32 --out FOLDER tries whether this runs")
        return
    with measured("gpu", __doc__, device, options.out, alone=device.type == "cuda") as bench:
        for model in options.models:
            for mode in options.modes:
                torch.compiler.reset()
                # One for every student, and none may fall back to eager passes without a word.
                torch._dynamo.config.recompile_limit = RECOMPILED
                torch._dynamo.config.fail_on_recompile_limit_hit = True
                teacher = random_unet(family_of(model, options.width), DTYPES[options.dtype], device)
                if mode == "compiled":
                    teacher.compile()
                time_plans(bench, model, mode, teacher, options)
                time_schedules(bench, model, mode, teacher, options)


if __name__ == "__main__":
    main()
