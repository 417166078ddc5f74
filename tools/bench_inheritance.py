"""Calibrated schedules against what else a user could pick, at the same measured time, on mini-sd's test prompts.

    python tools/bench_inheritance.py                                   # everything, alone on the machine
    python tools/bench_inheritance.py --samplers ddim dpm++ --steps 20  # a part of it
    python tools/bench_inheritance.py --quick                           # whether it runs; writes nothing
    python tools/bench_inheritance.py --full-size                       # Stable Diffusion 1.5 in bfloat16 alone

Rivals: fewer steps of each sampler, and the schedules of `rival_schedules.py`; of each the one that is best on
validation prompts within the time. DeepCache 0.1.1 itself is timed too where it is installed (`pip install
asdm-compress[bench]`). Every budget of every sampler and number of steps is written as soon as it is done, to
tools/results/inheritance.json, and a run that was cut off goes on after the last one. `--memory` adds what our
schedules hold at the size of Stable Diffusion 1.5, on the meta device. Pictures: inheritance.svg,
inheritance_steps.svg, inheritance_grid.png.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from matplotlib.figure import Figure
from measuring import check_alone
from rival_schedules import block_caching_ways, encoder_schedules, gates, power_caches, relative_changes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.core.units import parse_budget
from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import compare_pairs, to_tensor
from asdm_compress.evaluation.quality import scene_features
from asdm_compress.inheritance.actions import FULL, Action, conditional_only, cut, skip
from asdm_compress.inheritance.costs import fitted_macs, run_macs
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.forecast import HOLD, LINEAR
from asdm_compress.inheritance.modes import Mode, parse_mode
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.shapes import value_shapes
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall
from asdm_compress.models.families import FAMILIES, random_unet
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.counting import count
from asdm_compress.profiling.latency import median_ratio
from asdm_compress.reporting.calibration import steps_svg
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.reporting.plots import as_svg
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scheduling.goals import Choosing, Goal, Plan, choose_schedule
from asdm_compress.scheduling.menu import Kind, cut_sources, kind_of, light_name, menu_of
from asdm_compress.scheduling.rollouts import Judge
from asdm_compress.scheduling.search import DynamicProgram, find_front
from asdm_compress.scheduling.timing import Loop, time_kinds, time_runs
from asdm_compress.scheduling.ways import SOLVERS, Way, fewer_steps, uniform_caches
from asdm_compress.workflows.calibrate import CalibrateSettings, measured_shares, prepare, split_prompts
from asdm_compress.workflows.calibrated import schedule_of
from asdm_compress.workflows.progress import Silent

RESULTS = Path(__file__).parent / "results"
TEST_SEED, IMAGE_SEED = 5_151, 90_000
NEVER = 1e6  # seconds: what is left out of a search is given a time that no budget has
SLACK = 1.02  # by which rivals that cannot be set to a time may be over it
CACHES = ("DeepCache", "DeepCache, not uniform", "Faster Diffusion", "T-GATE", "Block Caching")
ABLATIONS = (
    "forecasts", "dynamic program", "fitted corrections", "guidance reuse", "skipped steps", "the unit level",
    "the cut level", "variable depth",
)  # fmt: skip
Rows = list[dict[str, Any]]


def without(choosing: Choosing, what: str) -> Choosing:
    """The same choice to be made without one ingredient."""
    menu, seconds = choosing.surrogate.menu, dict(choosing.times.seconds)
    names = {light: light_name(menu, light) for light in range(len(menu.lights))}
    surrogate, fitter = choosing.surrogate, choosing.fitter
    if what == "forecasts":
        surrogate = replace(surrogate, menu=replace(menu, forecasts=(HOLD,)))
    if what == "fitted corrections":
        fitter = None
    shallow = next((light for light, name in names.items() if name == "cut.0"), 0)
    for kind in seconds:
        light, conditional = kind
        name = names.get(light, "")
        gone = (
            (what == "guidance reuse" and conditional)
            or (what == "skipped steps" and name == "skip")
            or (what == "the unit level" and name.endswith("units"))
            or (what == "the cut level" and name.startswith("cut."))
            or (what == "variable depth" and name.startswith("cut.") and light != shallow)
        )
        if gone:
            seconds[kind] = NEVER
    times = replace(choosing.times, seconds=seconds)
    program = DynamicProgram(surrogate, times)
    front = find_front(program)
    corrected = find_front(program.at(times.corrected())) if fitter is not None else front
    return replace(choosing, surrogate=surrogate, times=times, front=front, corrected_front=corrected, fitter=fitter)


class Bench:
    """One sampler and number of steps: what is measured once, and the rows so far."""

    def __init__(self, sampler: str, steps: int, arguments: argparse.Namespace) -> None:
        self.pipeline = load_pipeline("mini-sd", LoadOptions())
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = make_scheduler(sampler, self.pipeline)
        self.sampler, self.steps, self.memory = sampler, steps, arguments.memory
        prompts = arguments.prompts
        self.settings = CalibrateSettings(
            Goal(), SamplingSettings(steps, arguments.guidance), None, None, prompts, prompts, prompts,
            repeats=arguments.repeats,
        )  # fmt: skip
        self.splits = split_prompts(self.pipeline, self.settings)
        self.one = encode(self.pipeline, self.splits.test, arguments.guidance)[:1]
        self.choosing = prepare(self.pipeline, self.settings, self.splits, self.one, Silent())
        self.captions = sample_captions(arguments.test_prompts, TEST_SEED)
        seeds = SamplingSettings(steps, arguments.guidance, IMAGE_SEED)
        self.test = Judge(self.pipeline, [c.text for c in self.captions], seeds)
        self.features = scene_features(to_tensor(self.test.pictures))
        self.changes = relative_changes(
            self.pipeline,
            encode(self.pipeline, self.splits.calibration[:8], arguments.guidance),
            self.settings.sampling,
        )
        self.rows: Rows = []
        self.shown: dict[str, Any] = {}  # the last budget's pictures by role, and our schedule

    def keep(self, budget: float, role: str, way: Way, plan: Plan | None = None) -> None:
        """Time a way beside the full run, and look at its pictures of the test prompts."""
        share = measured_shares([way], self.pipeline, self.settings, self.one)[0]
        pictures = self.test.pictures_of(way)
        psnr, ssim = compare_pairs(pictures, self.test.pictures)
        right = sum(load_reader().accuracy(to_tensor(pictures), self.captions))
        row = {
            "sampler": self.sampler, "steps": self.steps, "budget": budget, "role": role, "way": way.name,
            "predicted_share": way.seconds / self.choosing.every_times.full_run if way.seconds else None,
            "share": share, "psnr": sum(psnr) / len(psnr), "ssim": sum(ssim) / len(ssim),
            "psnr_interval": 1.96 * float(np.std(psnr, ddof=1)) / len(psnr) ** 0.5, "right": right, "of": len(pictures),
            "frechet_to_full": frechet_distance(scene_features(to_tensor(pictures)), self.features),
        }  # fmt: skip
        if plan is not None:
            schedule = schedule_of(plan, self.steps)
            row |= self.macs(schedule) | {"steps_of_it": [action.name for action in schedule.actions]}
            if self.memory:
                row["sd15_mib_per_sample"] = held_at_full_size(schedule.actions)
            self.shown["schedule"] = schedule
        self.shown[role] = (share, pictures[:6])
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def macs(self, schedule: Schedule) -> dict[str, int]:
        """The planned and the executed MACs of a run for one image."""
        unet, guided = self.pipeline.unet, self.one.shape[1] == 2
        loop = Way("", self.steps, 0.0, schedule).loop(self.pipeline, self.one, self.settings.sampling)
        # torch does not know the operations of the CPU's fused attention; of its products it does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loop()
        plan = Evaluator(unet).plan(schedule.actions, self.choosing.surrogate.timeline, guided)
        rows, size = (2 if guided else 1), int(unet.config["sample_size"])
        tokens = int(self.pipeline.tokenizer.model_max_length)
        shapes = value_shapes(unet, cut_sources(unet), size, size)
        planned = sum(run_macs(plan, count(unet, rows, size, size, tokens), count(unet, 1, size, size, tokens)))
        planned += sum(fitted_macs(plan, schedule.corrections, shapes, rows))
        return {"planned_macs": planned, "executed_macs": counter.get_total_flops() // 2}

    def best(self, ways: Sequence[Way]) -> Way:
        """The best on validation prompts."""
        return max(ways, key=lambda way: self.choosing.judge.score(way).mean())

    def budget(self, share: float) -> None:
        """Ours and all rivals within a share of the time."""
        choosing, times = self.choosing, self.choosing.every_times
        goal = Goal(limit=parse_budget([f"latency={share}x"])[0])
        plan: Plan = choose_schedule(choosing, goal, share)
        self.keep(share, "calibrated", plan.way, plan)
        rivals = {
            "fewer steps": fewer_steps(times, share, (None,)),
            "fewer steps, best sampler": fewer_steps(times, share, SOLVERS),
            "DeepCache": uniform_caches(choosing.every, times, share),
        }
        rivals["DeepCache, not uniform"] = power_caches(choosing, share, self.best_cuts(rivals["DeepCache"]))
        for role, ways in rivals.items():
            if ways:
                self.keep(share, role, self.best(ways))
        fixed = [*encoder_schedules(self.pipeline.unet, self.steps), *gates(self.pipeline.unet, self.steps)]
        measured = measured_shares(fixed, self.pipeline, self.settings, self.one)
        within = [way for way, took in zip(fixed, measured, strict=True) if took <= share * SLACK]
        for role in ("Faster Diffusion", "T-GATE"):
            ways = [way for way in within if way.name.startswith(role)]
            if ways:
                self.keep(share, role, self.best(ways))
        slowest = self.first_within(list(block_caching_ways(self.changes, self.steps)), share * SLACK)
        if slowest is not None:
            self.keep(share, "Block Caching", slowest)

    def best_cuts(self, ways: Sequence[Way], count: int = 3) -> list[int]:
        """The cuts at which uniform schedules do best on validation prompts."""
        known = sorted(ways, key=lambda way: -self.choosing.judge.score(way).mean())[:count]
        return [kind_of(self.choosing.every, way.rule.light)[0] for way in known if isinstance(way.rule, Mode)]

    def first_within(self, ways: Sequence[Way], share: float) -> Way | None:
        """Of ways that are ever faster, the first within a share of the time; found by halving."""
        low, high = 0, len(ways)
        while low < high:
            middle = (low + high) // 2
            took = measured_shares([ways[middle]], self.pipeline, self.settings, self.one)[0]
            low, high = (low, middle) if took <= share else (middle + 1, high)
        return ways[low] if low < len(ways) else None

    def ablations(self, share: float) -> None:
        """Ours without one ingredient at a time, none of them with regular modes beside.

        Without the dynamic program regular schedules are all there is, with linear forecasts and corrections.
        """
        for what in (None, *ABLATIONS):
            choosing = self.choosing if what in (None, "dynamic program") else without(self.choosing, str(what))
            try:
                plans = choosing.candidates(share)
            except AsdmError as error:
                print(f"without {what}: {error}", flush=True)
                continue
            kept = [plan for plan in plans if (plan.choices is None) == (what == "dynamic program")]
            fitted = choosing.fitted(share, kept)
            kept += [plan for plan in fitted if (plan.choices is None) == (what == "dynamic program")]
            found = choosing.best(kept)
            self.keep(share, f"search alone, without {what}" if what else "search alone", found.way)

    def deepcache_itself(self, interval: int, branch: int) -> None:
        """DeepCache 0.1.1's own package beside our schedule of the same settings: pictures and seconds."""
        if importlib.util.find_spec("DeepCache") is None:
            print("DeepCache is not installed: its own times are left out", flush=True)
            return
        import DeepCache

        name = f"uniform:{interval},branch={branch},forecast=hold"
        ours = Way(name, self.steps, 0.0, parse_mode(name)).loop(self.pipeline, self.one, self.test.settings)
        mine = ours()
        theirs = Way("plain", self.steps, 0.0).loop(self.pipeline, self.one, self.test.settings)
        theirs.pipeline.unet = copy.deepcopy(self.pipeline.unet)
        helper = DeepCache.DeepCacheSDHelper(pipe=theirs.pipeline)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        difference = float((theirs() - mine).abs().max())
        seconds = [sorted(times)[len(times) // 2] for times in time_runs([ours, theirs], self.settings.repeats)]
        row = {"role": "DeepCache 0.1.1 itself", "sampler": self.sampler, "steps": self.steps, "way": name,
               "largest_difference": difference, "our_seconds": seconds[0], "their_seconds": seconds[1]}  # fmt: skip
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def pictures(self) -> None:
        """The heat map of the last budget's schedule, and the grid of full, DeepCache and ours."""
        schedule: Schedule = self.shown["schedule"]
        (RESULTS / "inheritance_steps.svg").write_text(steps_svg(schedule.actions, ()), encoding="utf-8")
        roles = {"calibrated": "ours", "DeepCache": "DeepCache", "fewer steps": "fewer steps"}
        rows = [("full\n1.00x", self.test.pictures[:6])]
        rows += [(f"{name}\n{self.shown[r][0]:.2f}x", self.shown[r][1]) for r, name in roles.items() if r in self.shown]
        labelled_grid(rows, [c.text for c in self.captions[:6]]).save(RESULTS / "inheritance_grid.png")


@torch.no_grad()
def held_at_full_size(actions: Sequence[Action]) -> float:
    """The most MiB per sample that a guided run of these actions holds at the size of SD 1.5, in half precision."""
    config = FAMILIES["sd15"].unet_config
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).half()
        rows, size = 2, config["sample_size"]
        sample = torch.empty(rows, 4, size, size, dtype=torch.half)
        call = UNetCall(sample, torch.empty(()), torch.empty(rows, 77, config["cross_attention_dim"], dtype=torch.half))
    # Any σs that fall do: what is held does not depend on them.
    levels = tuple(float(x) for x in np.geomspace(14, 0.03, len(actions)))
    timeline = Timeline(tuple(float(len(actions) - i) for i in range(len(actions))), levels)
    run, most = Run(Evaluator(unet), actions, timeline, guided=True), 0
    while not run.finished:
        run.evaluate(call)
        most = max(most, run.held_bytes)
    return round(most / rows / 2**20, 3)


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
        rows.append(row | {"off": predicted / times.full_run / measured - 1, "held": held_at_full_size(actions)})
    return {"steps": steps, "full_seconds": sorted(full)[len(full) // 2], "rows": rows}


def summary(rows: Rows) -> Rows:
    """For every cell: ours over the best cache and over fewer steps in dB, and the time at which ours is as good."""
    found = []
    cells = dict.fromkeys((r["sampler"], r["steps"], r["budget"]) for r in rows if r["role"] == "calibrated")
    for sampler, steps, budget in cells:
        here = [r for r in rows if (r["sampler"], r["steps"], r.get("budget")) == (sampler, steps, budget)]
        own = next(r for r in here if r["role"] == "calibrated")
        cache = max((r for r in here if r["role"] in CACHES), key=lambda r: r["psnr"], default=None)
        fewer = max((r for r in here if r["role"].startswith("fewer steps")), key=lambda r: r["psnr"], default=None)
        line = sorted(
            (r["psnr"], r["share"])
            for r in rows
            if (r["sampler"], r["steps"], r["role"]) == (sampler, steps, "calibrated")
        )
        row = {"sampler": sampler, "steps": steps, "budget": budget, "ours": own["psnr"], "share": own["share"]}
        if cache is not None:
            row |= {"best_cache": cache["role"], "over_best_cache": own["psnr"] - cache["psnr"]}
            if line[0][0] <= cache["psnr"]:
                same = float(np.interp(cache["psnr"], [p for p, _ in line], [s for _, s in line]))
                row["time_for_the_same_psnr"] = same / cache["share"]
            else:  # even our fastest schedule is better
                row["time_for_the_same_psnr_below"] = line[0][1] / cache["share"]
        if fewer is not None:
            row |= {"fewer_steps": fewer["way"], "over_fewer_steps": own["psnr"] - fewer["psnr"]}
        if own["predicted_share"]:
            row["time_off"] = own["predicted_share"] / own["share"] - 1
        row["macs_as_planned"] = own["planned_macs"] == own["executed_macs"]
        found.append(row)
    return found


def picture(rows: Rows) -> str:
    """PSNR over measured time, one panel for every sampler and number of steps."""
    rows = [row for row in rows if "psnr" in row and not row["role"].startswith("search alone")]
    panels = list(dict.fromkeys((row["sampler"], row["steps"]) for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False).flat
    for axes in list(every)[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(figure.axes, panels, strict=False):
        for role in dict.fromkeys(row["role"] for row in rows):
            points = sorted(
                (row["share"], row["psnr"])
                for row in rows
                if row["role"] == role and (row["sampler"], row["steps"]) == panel
            )
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=role)
        axes.set_title(f"{panel[0]}, {panel[1]} steps", loc="left")
        axes.set_xlabel("time of the full run")
        axes.set_ylabel("PSNR to the full run, dB")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return as_svg(figure)


class Kept:
    """The results so far, on disk after every cell; those of other settings are begun anew."""

    def __init__(self, path: Path, arguments: argparse.Namespace, fresh: bool) -> None:
        self.path, self.writes = path, not arguments.quick
        names = ("prompts", "test_prompts", "guidance", "repeats", "memory")
        self.content: dict[str, Any] = {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "settings": {name: getattr(arguments, name) for name in names},
            "cells": [],
            "rows": [],
        }
        if self.writes and path.exists() and not fresh:
            before = json.loads(path.read_text(encoding="utf-8"))
            same = all(before.get(k) == self.content[k] for k in ("processor", "threads", "versions", "settings"))
            if same:
                self.content = before
            else:
                print("the results there are of other settings: beginning anew", flush=True)

    def has(self, cell: Sequence[Any]) -> bool:
        """Whether a cell is done."""
        return list(cell) in self.content["cells"]

    def add(self, cell: Sequence[Any], rows: Rows, seconds: float) -> None:
        """Write a cell that is done."""
        self.content["cells"].append(list(cell))
        self.content["rows"] += rows
        self.content.setdefault("seconds", {})[" ".join(map(str, cell))] = round(seconds, 1)
        self.content["summary"] = summary(self.content["rows"])
        self.write()

    def write(self) -> None:
        """To disk, unless nothing is to be written."""
        if self.writes:
            RESULTS.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
            if self.content["rows"]:
                (RESULTS / "inheritance.svg").write_text(picture(self.content["rows"]), encoding="utf-8")


def main() -> None:
    """Every sampler, number of steps and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="DDIM, 8 steps, 4 prompts, one budget, nothing written")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpm++", "unipc", "euler-a"])
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 25, 50])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.55, 0.4, 0.3])
    parser.add_argument("--prompts", type=int, default=16, help="to measure on, and as many to choose on")
    parser.add_argument("--test-prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-ablations", action="store_true", help="ours alone, with all ingredients")
    parser.add_argument("--memory", action="store_true", help="what our schedules hold at the size of SD 1.5, too")
    parser.add_argument("--full-size", action="store_true", help="predicted and measured time at the size of SD 1.5")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever is there")
    arguments = parser.parse_args()
    check_alone()
    if arguments.quick:
        arguments.samplers, arguments.steps, arguments.budgets = ["ddim"], [8], [0.55]
        arguments.prompts = arguments.test_prompts = 4
        arguments.repeats = 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kept = Kept(RESULTS / "inheritance.json", arguments, arguments.fresh)
    if arguments.full_size:
        kept.content["sd15 bf16"] = full_size(max(3, arguments.repeats // 3))
        print(json.dumps(kept.content["sd15 bf16"]), flush=True)
        kept.write()
        return
    middle = sorted(arguments.budgets)[len(arguments.budgets) // 2]
    for steps in arguments.steps:
        for sampler in arguments.samplers:
            cells = [(sampler, steps, share) for share in arguments.budgets]
            more = [] if arguments.no_ablations else [(sampler, steps, "ablations")]
            if all(kept.has(cell) for cell in (*cells, *more)):
                continue
            began = time.perf_counter()
            bench = Bench(sampler, steps, arguments)
            for cell in (*cells, *more):
                if kept.has(cell):
                    continue
                if cell in more:
                    bench.ablations(middle)
                    bench.deepcache_itself(3, 0)
                else:
                    bench.budget(float(cell[2]))
                    if kept.writes and cell[2] == middle and not (RESULTS / "inheritance_grid.png").exists():
                        bench.pictures()
                kept.add(cell, bench.rows, time.perf_counter() - began)
                bench.rows, began = [], time.perf_counter()
    for row in kept.content.get("summary", []):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
