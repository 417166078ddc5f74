"""Calibrated schedules against what else a user could pick, at the same measured time, on mini-sd's test prompts.

    python tools/bench_inheritance.py                                   # everything, alone on the machine
    python tools/bench_inheritance.py --samplers ddim dpm++ --steps 20  # a part of it
    python tools/bench_inheritance.py --quick                           # whether it runs; writes nothing
    python tools/bench_inheritance.py --full-size                       # Stable Diffusion 1.5 in bfloat16 alone

Rivals: fewer steps of each sampler, the schedules of `rival_schedules.py`, and caches in fewer steps; of each the one
that is best on validation prompts within the time as predicted (of Block Caching, the least threshold). All of a budget
are then timed in turns; what two of them have in common is timed once. DeepCache 0.1.1 itself is timed too where it is
installed (`pip install asdm-compress[bench]`). Every budget of every sampler and number of steps is written as soon as
it is done, to tools/results/inheritance.json, and a run that was cut off goes on after the last one. What our schedules
hold and compute at the size of Stable Diffusion 1.5 comes from the meta device. Pictures: inheritance.svg,
inheritance_steps.svg, inheritance_grid.png; `--full-size` writes inheritance_full_size.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from inheritance_ablations import ABLATIONS, without
from inheritance_full_size import add_full_size, on_paper
from inheritance_macs import macs_share, planned_macs
from inheritance_results import SLACK, Kept, Rows, shown_row
from measuring import RESULTS, LoadMeter, check_alone
from PIL.Image import Image
from rival_schedules import (
    block_caching_ways,
    caches_in_fewer_steps,
    encoder_schedules,
    gates,
    power_caches,
    relative_changes,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.units import parse_budget
from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import compare_pairs, to_tensor
from asdm_compress.evaluation.quality import scene_features
from asdm_compress.inheritance.modes import Mode, parse_mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scheduling.goals import Goal, Plan, choose_schedule
from asdm_compress.scheduling.menu import kind_of
from asdm_compress.scheduling.rollouts import Judge, Score, gain
from asdm_compress.scheduling.timing import time_runs
from asdm_compress.scheduling.ways import SOLVERS, Way, fewer_steps, uniform_caches
from asdm_compress.workflows.calibrate import CalibrateSettings, prepare, split_prompts
from asdm_compress.workflows.calibrated import schedule_of
from asdm_compress.workflows.progress import Silent

TEST_SEED, IMAGE_SEED = 5_151, 90_000
MOST_ROUNDS = 2
SHOWN = 6  # columns of the grid
FEWER = (0.5, 0.6, 0.7, 0.8)  # of the full run's steps, that caches are tried with too
DENSER = 1.12  # times the time as predicted: caches that take no more are timed, since predictions may be too high


class Bench:
    """One sampler and number of steps: what is measured once, and the rows so far."""

    def __init__(self, sampler: str, steps: int, arguments: argparse.Namespace) -> None:
        self.pipeline = load_pipeline("mini-sd", LoadOptions())
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = make_scheduler(sampler, self.pipeline)
        self.sampler, self.steps = sampler, steps
        few, many = arguments.prompts, arguments.validation_prompts
        self.settings = CalibrateSettings(
            Goal(), SamplingSettings(steps, arguments.guidance), None, None, few, many, few, repeats=arguments.repeats
        )
        self.splits = split_prompts(self.pipeline, self.settings)
        self.one = encode(self.pipeline, self.splits.test, arguments.guidance)[:1]
        self.choosing = prepare(self.pipeline, self.settings, self.splits, self.one, Silent())
        self.captions = sample_captions(arguments.test_prompts, TEST_SEED)
        seeds = SamplingSettings(steps, arguments.guidance, IMAGE_SEED)
        self.test = Judge(self.pipeline, [c.text for c in self.captions], seeds)
        self.features = scene_features(to_tensor(self.test.pictures))
        self.full_right = sum(load_reader().accuracy(to_tensor(self.test.pictures), self.captions))
        self.changes = relative_changes(
            self.pipeline,
            encode(self.pipeline, self.splits.calibration[:8], arguments.guidance),
            self.settings.sampling,
        )
        self.rows: Rows = []
        self.known_shares: dict[str, float] = {}  # of ways without a predicted time, as measured, by their names
        self.scores: dict[str, Score] = {}  # of the last budget, by role
        self.shown: dict[str, tuple[float, list[Image]]] = {}  # the last budget's shares and pictures, by role

    def keep(self, budget: float, ways: Mapping[str, Way], plan: Plan | None = None) -> None:
        """Time ways, by role, beside the full run, and look at their pictures of the test prompts.

        `plan` is that of the first.
        """
        first = next(iter(ways), None)
        different = {self.same(way): way for way in ways.values()}
        shares = dict(zip(different, self.timed(list(different.values())), strict=True))
        pictures = {same: self.test.pictures_of(way) for same, way in different.items()}
        for role, way in ways.items():
            same = self.same(way)
            self.keep_row(budget, role, way, shares[same], pictures[same], plan if role == first else None)

    def same(self, way: Way) -> tuple[Any, ...]:
        """What ways have in common that do the same: the pipeline's own sampler may be asked for by its name."""
        return (way.scheduler or self.sampler, replace(way, scheduler=None).key)

    def keep_row(
        self, budget: float, role: str, way: Way, shares: tuple[float, float], pictures: list[Image], plan: Plan | None
    ) -> None:
        """Write down what a way takes and what its pictures are like."""
        share, wall = shares
        psnr, ssim = compare_pairs(pictures, self.test.pictures)
        self.scores[role] = Score(tuple(psnr), tuple(ssim))
        right = sum(load_reader().accuracy(to_tensor(pictures), self.captions))
        row = {
            "sampler": self.sampler, "steps": self.steps, "budget": budget, "role": role, "way": way.name,
            "predicted_share": way.seconds / self.choosing.every_times.full_run if way.seconds else None,
            "share": share, "wall_share": wall, **self.scores[role].as_json(),
            "macs_share": macs_share(self.pipeline, way, self.settings.sampling),
            "right": right, "full_right": self.full_right,
            "frechet_to_full": frechet_distance(scene_features(to_tensor(pictures)), self.features),
        }  # fmt: skip
        if plan is not None:
            schedule = schedule_of(plan, self.steps)
            row |= self.macs(schedule) | on_paper(schedule.actions)
            row["steps_of_it"] = " ".join(action.name for action in schedule.actions)
        self.shown[role] = (share, pictures[:SHOWN])
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def timed(self, ways: Sequence[Way], turns: int | None = None) -> list[tuple[float, float]]:
        """Ways' shares of the full run's time in turns with it: of their thread's processor time, and on the clock.

        On a machine of one's own the two are the same. With several threads both are what the clock says.
        """
        every = (Way("full", self.steps, 0.0), *ways)
        loops = [way.loop(self.pipeline, self.one, self.settings.sampling) for way in every]
        alone = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        taken: list[list[tuple[float, float]]] = []
        for turn in range((turns or self.settings.repeats) + 1):
            marks = [(alone(), time.perf_counter())]
            for loop in loops:
                loop()
                marks.append((alone(), time.perf_counter()))
            full, *own = ([b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(marks))
            if turn:  # the first one warms up
                taken.append([(each[0] / full[0], each[1] / full[1]) for each in own])
        return [
            (median(processor), median(wall))
            for processor, wall in (zip(*each, strict=True) for each in zip(*taken, strict=True))
        ]

    def macs(self, schedule: Schedule) -> dict[str, int]:
        """The planned and the executed MACs of a run for one image."""
        loop = Way("", self.steps, 0.0, schedule).loop(self.pipeline, self.one, self.settings.sampling)
        # torch does not know the operations of the CPU's fused attention; of its products it does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loop()
        planned = planned_macs(self.pipeline, schedule, self.settings.sampling)
        return {"planned_macs": planned, "executed_macs": counter.get_total_flops() // 2}

    def best(self, ways: Sequence[Way]) -> Way:
        """The best on validation prompts."""
        return self.choosing.judge.race(ways)[0]

    def budget(self, share: float) -> None:
        """Ours and all rivals within a share of the time."""
        choosing, times = self.choosing, self.choosing.every_times
        self.scores, self.shown, first = {}, {}, len(self.rows)
        goal = Goal(limit=parse_budget([f"latency={share}x"])[0])
        plan = self.plan(goal, share)
        rivals = {
            "fewer steps": fewer_steps(times, share * SLACK, (None,)),
            "fewer steps, best sampler": fewer_steps(times, share * SLACK, SOLVERS),
            "DeepCache": [*uniform_caches(choosing.every, times, share * SLACK), *self.denser(share * SLACK)],
        }
        rivals["DeepCache, not uniform"] = power_caches(choosing, share * SLACK, self.best_cuts(rivals["DeepCache"]))
        rivals["DeepCache in fewer steps"] = [
            way
            for part in FEWER
            for way in caches_in_fewer_steps(choosing.every, times, share * SLACK, round(part * self.steps))
        ]
        chosen = {"calibrated": plan.way} | {role: self.best(ways) for role, ways in rivals.items() if ways}
        fixed = [*encoder_schedules(self.pipeline.unet, self.steps), *gates(self.pipeline.unet, self.steps)]
        within = [way for way in fixed if self.share(way) <= share * SLACK]
        for role in ("Faster Diffusion", "T-GATE"):
            ways = [way for way in within if way.name.startswith(role)]
            if ways:
                chosen[role] = self.best(ways)
        slowest = self.first_within(list(block_caching_ways(self.changes, self.steps)), share * SLACK)
        if slowest is not None:
            chosen["Block Caching"] = slowest
        self.keep(share, chosen, plan)
        own, *others = self.scores
        self.rows[first]["gains"] = {role: gain(self.scores[own], self.scores[role]) for role in others}

    def denser(self, share: float) -> list[Way]:
        """DeepCache's uniform schedules that take more than a share of the time as predicted, and not as measured."""
        times = self.choosing.every_times
        more = uniform_caches(self.choosing.every, times, share * DENSER)
        return [way for way in more if way.seconds > share * times.full_run and self.share(way) <= share]

    def plan(self, goal: Goal, share: float) -> Plan:
        """The schedule for a share of the time; as `calibrate` does, searched again where it takes more when timed."""
        plan = choose_schedule(self.choosing, goal, share)
        for _ in range(MOST_ROUNDS):
            taken = self.timed([plan.way])[0][0]
            if taken <= share * SLACK:
                break
            aim = share * plan.way.seconds / self.choosing.every_times.full_run / taken
            print(f"it takes {taken:.3f}x of the time: searching again for {aim:.3f}x", flush=True)
            plan = choose_schedule(self.choosing, goal, aim)
        return plan

    def share(self, way: Way) -> float:
        """About the time of a way whose time is not predicted; measured once."""
        if way.name not in self.known_shares:
            self.known_shares[way.name] = self.timed([way], 2)[0][0]
        return self.known_shares[way.name]

    def best_cuts(self, ways: Sequence[Way], count: int = 3) -> list[int]:
        """The cuts at which uniform schedules do best on validation prompts."""
        known = self.choosing.judge.race(ways, leave=count)[:count]
        return [kind_of(self.choosing.every, way.rule.light)[0] for way in known if isinstance(way.rule, Mode)]

    def first_within(self, ways: Sequence[Way], share: float) -> Way | None:
        """Of ways that are ever faster, the first within a share of the time; found by halving."""
        low, high = 0, len(ways)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.share(ways[middle]) <= share else (middle + 1, high)
        return ways[low] if low < len(ways) else None

    def ablations(self, share: float) -> None:
        """Ours without one ingredient at a time, none of them with regular modes beside.

        Without the dynamic program there is no search: regular schedules are all there is, with linear forecasts and
        corrections.
        """
        self.scores = {}
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
            role = f"search alone, without {what}" if what else "search alone"
            self.keep(share, {role: found.way})
            self.rows[-1]["over_everything"] = gain(self.scores[role], self.scores["search alone"])

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

    def grid(self) -> Image:
        """The last budget's pictures: the full run's, ours, DeepCache's and those of fewer steps."""
        roles = {"calibrated": "ours", "DeepCache": "DeepCache", "fewer steps": "fewer steps"}
        rows = [("full\n1.00x", self.test.pictures[:SHOWN])]
        for role, name in roles.items():
            if role in self.shown:
                share, pictures = self.shown[role]
                rows.append((f"{name}\n{share:.2f}x, {self.scores[role].mean():.1f} dB", pictures))
        return labelled_grid(rows, [c.text for c in self.captions[:SHOWN]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="DDIM, 8 steps, 4 prompts, one budget, nothing written")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpm++", "unipc", "euler-a"])
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 25, 50])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.55, 0.4, 0.3])
    parser.add_argument("--prompts", type=int, default=16, help="to measure on")
    parser.add_argument("--validation-prompts", type=int, default=32, help="to choose on")
    parser.add_argument("--test-prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-ablations", action="store_true", help="ours alone, with all ingredients")
    parser.add_argument("--full-size", action="store_true", help="predicted and measured time at the size of SD 1.5")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever is there")
    parser.add_argument("--renew", action="store_true", help="measure anew what was measured by other code")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samplers, arguments.steps, arguments.budgets = ["ddim"], [8], [0.55]
        arguments.prompts = arguments.validation_prompts = arguments.test_prompts = 4
        arguments.repeats = 2
    return arguments


def main() -> None:
    """Every sampler, number of steps and budget."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    check_alone()
    if arguments.full_size:
        add_full_size(arguments.repeats)
        return
    kept = Kept.of(arguments, __doc__ or "")
    middle = sorted(arguments.budgets)[len(arguments.budgets) // 2]
    grids: dict[tuple[Any, ...], Image] = {}
    for steps in arguments.steps:
        for sampler in arguments.samplers:
            cells = [(sampler, steps, share) for share in arguments.budgets]
            more = [] if arguments.no_ablations else [(sampler, steps, "ablations")]
            if all(kept.has(cell) for cell in (*cells, *more)):
                continue
            began, meter = time.perf_counter(), LoadMeter()
            bench = Bench(sampler, steps, arguments)
            for cell in (*cells, *more):
                if kept.has(cell):
                    continue
                if cell in more:
                    bench.ablations(middle)
                    bench.deepcache_itself(3, 0)
                else:
                    bench.budget(float(cell[2]))
                    grids[cell] = bench.grid()
                kept.add_cell(cell, bench.rows, time.perf_counter() - began, meter.others())
                shown = shown_row(kept.rows)
                where = (shown["sampler"], shown["steps"], shown["budget"]) if shown else None
                if kept.writes and where in grids:
                    grids[where].save(RESULTS / "inheritance_grid.png")
                bench.rows, began, meter = [], time.perf_counter(), LoadMeter()
    for row in kept.facts.get("summary", []):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
