"""Packages that make Stable Diffusion faster, installed and run, beside our calibrated schedule at the same time.

    python tools/bench_rivals.py                                    # alone on the machine
    python tools/bench_rivals.py --validation-prompts 6 --test-prompts 24 --budgets 0.7 0.5
    python tools/bench_rivals.py --quick                            # whether it runs; writes nothing

Every setting of every package (`rival_packages.py`) is timed beside the full run, and those that keep a budget are
tried on validation prompts. For every budget the best one of each package is timed again with ours, all in turns, and
judged on captions and seeds that chose nothing. Ours is what `asdm_compress.calibrate` finds for `latency=BUDGETx` with
as many prompts to choose on. Packages that are not installed are left out: `pip install 'asdm-compress[bench]'`. Every
step is written to tools/results/rivals.json, and a run that was cut off goes on there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from measuring import Resumable, Turns, check_alone, in_turns, plain
from mini_sd.weights import bundled_weights
from PIL.Image import Image
from rival_packages import PACKAGES, Setting, every_setting, package_versions, refusals

from asdm_compress.assembly.in_time import TIMING_TOLERANCE
from asdm_compress.evaluation import intervals
from asdm_compress.evaluation.fidelity import compare_pairs, to_tensor
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.images import decode
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scheduling.goals import Goal
from asdm_compress.scheduling.rollouts import Judge
from asdm_compress.scheduling.timing import Loop
from asdm_compress.scheduling.ways import Way
from asdm_compress.workflows.calibrate import VALIDATION_SEED, CalibrateSettings, calibrate, split_prompts

ABOUT = __doc__ or ""
TEST_SEED, IMAGE_SEED = 6_262, 70_000  # of the captions and of the first image that nothing is chosen on
OURS = "calibrated schedule"
LEAST_USED = 0.75  # of a budget, by settings that are tried for it where there are such
ROUGHLY = 0.35  # that times taken in the grid may be off by
TOGETHER = 10  # settings that are timed in turns with one full run


class Contest:
    """One sampler and number of steps: the prompts, the full run's pictures, and every setting."""

    def __init__(self, arguments: argparse.Namespace, bench: Resumable) -> None:
        self.arguments, self.bench = arguments, bench
        self.pipeline = load_pipeline("mini-sd", LoadOptions())
        self.pipeline.set_progress_bar_config(disable=True)
        if arguments.scheduler:
            self.pipeline.scheduler = make_scheduler(arguments.scheduler, self.pipeline)
        self.sampling = SamplingSettings(arguments.steps, arguments.guidance)
        few = arguments.validation_prompts
        self.ours = CalibrateSettings(
            Goal(),
            self.sampling,
            None,
            None,
            arguments.calibration_prompts,
            few,
            max(2, few // 2),
            repeats=arguments.final_repeats,
            curve=0,
        )
        prompts = split_prompts(self.pipeline, self.ours)
        self.one = encode(self.pipeline, prompts.validation, arguments.guidance)[:1]
        self.validation = Judge(self.pipeline, prompts.validation, replace(self.sampling, seed=VALIDATION_SEED))
        seen = {*prompts.calibration, *prompts.validation}
        fresh = [c for c in sample_captions(2 * arguments.test_prompts, TEST_SEED) if c.text not in seen]
        self.captions = fresh[: arguments.test_prompts]
        texts = [c.text for c in self.captions]
        self.test = Judge(self.pipeline, texts, replace(self.sampling, seed=IMAGE_SEED))
        self.settings = {s.key: s for s in every_setting(arguments.steps, arguments.budgets, arguments.quick)}

    @property
    def grid(self) -> dict[str, dict[str, Any]]:
        """What is known of every setting."""
        found: dict[str, dict[str, Any]] = self.bench.facts["grid"]
        return found

    def timed(self, loops: Mapping[str, Loop], repeats: int) -> Turns:
        """Loops in turns."""
        return in_turns(loops, repeats, processor_time=self.arguments.processor_time)

    def try_caches(self) -> None:
        """What diffusers' own caches do here."""
        if not self.bench.facts["refusals"]:
            self.bench.facts["refusals"] = refusals(self.pipeline, self.one, replace(self.sampling, steps=8))
            self.bench.write()

    def time_all(self) -> None:
        """The time of every setting over the full run's; of settings that fail the error."""
        full = Loop(self.pipeline, self.one, self.sampling)
        short = replace(self.sampling, steps=2)
        waiting = [key for key in self.settings if not {"share", "error"} & self.grid.get(key, {}).keys()]
        for first in range(0, len(waiting), TOGETHER):
            keys = waiting[first : first + TOGETHER]
            loops = {}
            for key in keys:
                try:
                    setting = self.settings[key]
                    replace(setting, steps=None).loop(self.pipeline, self.one, short)()
                    loops[key] = setting.loop(self.pipeline, self.one, self.sampling)
                except Exception as error:  # a package's own, at a setting that it takes
                    self.grid[key] = {"error": f"{type(error).__name__}: {error}"}
            turns = self.timed({"full": full, **loops}, self.arguments.repeats)
            for key in loops:
                self.grid[key] = {**self.grid.get(key, {}), "share": plain(turns.ratio(key, "full").value)}
                print(key, self.grid[key], flush=True)
            self.bench.write()

    def pictures(self, judge: Judge, setting: Setting) -> list[Image]:
        """A setting's pictures of a judge's prompts and seeds."""
        latents = []
        for first in range(0, len(judge.texts), judge.batch):
            here = replace(judge.settings, seed=judge.settings.seed + first)
            texts = judge.texts[first : first + judge.batch]
            latents.append(setting.loop(self.pipeline, texts, here)())
        return decode(self.pipeline, torch.cat(latents), judge.batch)

    def time_again(self, keys: Sequence[str]) -> None:
        """What decides whether settings keep a budget: each in turns with the full run alone, as ours is timed."""
        full = Loop(self.pipeline, self.one, self.sampling)
        for key in keys:
            if "timed_again" not in self.grid[key]:
                loops = {"full": full, key: self.settings[key].loop(self.pipeline, self.one, self.sampling)}
                share = self.timed(loops, self.arguments.final_repeats).ratio(key, "full")
                self.grid[key] |= {"share": plain(share.value), "timed_again": True}
                print(key, self.grid[key], flush=True)
                self.bench.write()

    def best(self, rival: str, budget: float) -> tuple[list[str], str | None]:
        """The settings of a rival within a time, and of those that use most of it the best on validation prompts."""
        known = [key for key, found in self.grid.items() if "share" in found and key in self.settings]
        own = [key for key in known if self.settings[key].rival == rival]
        self.time_again([key for key in own if abs(self.grid[key]["share"] / budget - 1) <= ROUGHLY])
        within = [
            key
            for key in known
            if self.settings[key].rival == rival and self.grid[key]["share"] <= budget * (1 + TIMING_TOLERANCE)
        ]
        near = [key for key in within if self.grid[key]["share"] >= LEAST_USED * budget] or within
        for key in near:
            if "psnr" not in self.grid[key]:
                pictures = self.pictures(self.validation, self.settings[key])
                psnr, _ = compare_pairs(pictures, self.validation.pictures)
                self.grid[key]["psnr"] = plain(sum(psnr) / len(psnr))
                print(key, self.grid[key], flush=True)
                self.bench.write()
        return within, max(near, key=lambda key: self.grid[key]["psnr"], default=None)

    def schedule(self, budget: float) -> Schedule:
        """Ours, found in Python as a user would."""
        return calibrate(self.pipeline, f"latency={budget}x", self.ours)

    def budget(self, budget: float) -> None:
        """Ours and the best of every rival in one time, timed in turns and judged on test prompts."""
        chosen: dict[str, Setting] = {}
        counts: dict[str, tuple[int, int]] = {}
        for rival in dict.fromkeys(s.rival for s in self.settings.values()):
            tried = [key for key, found in self.grid.items() if key in self.settings and key.startswith(f"{rival}: ")]
            within, best = self.best(rival, budget)
            counts[rival] = (len(tried), len(within))
            if best is not None:
                chosen[rival] = self.settings[best]
                continue
            timed = [key for key in tried if "share" in self.grid[key]]
            fastest = min(timed, key=lambda key: self.grid[key]["share"], default=None)
            row = {"budget": budget, "rival": rival, "package": PACKAGES.get(rival), "tried": len(tried), "within": 0}
            if fastest is not None:
                row |= {"fastest": self.settings[fastest].name, "fastest_share": self.grid[fastest]["share"]}
            self.bench.add(row)
        way = Way(OURS, self.sampling.steps, 0.0, self.schedule(budget))
        loops = {name: setting.loop(self.pipeline, self.one, self.sampling) for name, setting in chosen.items()}
        loops |= {"full": Loop(self.pipeline, self.one, self.sampling)}
        loops |= {OURS: way.loop(self.pipeline, self.one, self.sampling)}
        turns = self.timed(loops, self.arguments.final_repeats)
        ours = self.test.pictures_of(way)
        our_psnr, _ = compare_pairs(ours, self.test.pictures)
        for name, images in [(OURS, ours), *((r, self.pictures(self.test, s)) for r, s in chosen.items())]:
            psnr, ssim = compare_pairs(images, self.test.pictures)
            right = load_reader().accuracy(to_tensor(images), self.captions)
            row = {
                "budget": budget, "rival": name, "package": PACKAGES.get(name),
                "setting": None if name == OURS else chosen[name].name,
                "tried": counts.get(name, (None, None))[0], "within": counts.get(name, (None, None))[1],
                "seconds": turns.median(name), "share": turns.ratio(name, "full"),
                "psnr": intervals.mean(psnr), "ssim": intervals.mean(ssim), "right": intervals.share(right),
            }  # fmt: skip
            if name == OURS:
                row["validation_psnr"] = self.validation.score(way).mean()
            else:
                row |= {"validation_psnr": self.grid[chosen[name].key]["psnr"]}
                row |= {"ours_over": intervals.mean_difference(psnr, our_psnr)}
            self.bench.add(row)

    def full_run(self) -> None:
        """The row of the run that computes everything."""
        turns = self.timed({"full": Loop(self.pipeline, self.one, self.sampling)}, self.arguments.final_repeats)
        right = load_reader().accuracy(to_tensor(self.test.pictures), self.captions)
        self.bench.add(
            {"budget": None, "rival": "full run", "seconds": turns.median("full"), "right": intervals.share(right)}
        )


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few settings, steps and prompts; nothing written")
    parser.add_argument("--scheduler", help="of the pipeline; by default its own")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--calibration-prompts", type=int, default=16, help="that ours measures on")
    parser.add_argument("--validation-prompts", type=int, default=16, help="on which all are chosen")
    parser.add_argument("--test-prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="turns in which the grid is timed")
    parser.add_argument("--final-repeats", type=int, default=9, help="turns in which the chosen ones are timed")
    parser.add_argument("--processor-time", action="store_true", help="count processor time: beside other work")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever is there")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.steps, arguments.budgets = 8, [0.8]
        arguments.calibration_prompts = arguments.validation_prompts = arguments.test_prompts = 2
        arguments.repeats = arguments.final_repeats = 2
    return arguments


def main() -> None:
    """Try the caches, time the grid, and hold the contest for every budget."""
    arguments = parsed()
    if not (arguments.quick or arguments.processor_time):
        check_alone()
    names = (
        "processor_time",
        "scheduler",
        "steps",
        "guidance",
        "calibration_prompts",
        "validation_prompts",
        "test_prompts",
    )
    setup = {name: getattr(arguments, name) for name in names}
    setting = {"packages": package_versions(), "mini_sd": bundled_weights(), "setup": setup}
    bench = Resumable("rivals", ABOUT, torch.device("cpu"), setting=setting, writes=not arguments.quick)
    bench.begin(arguments.fresh)
    bench.facts = {"refusals": [], "grid": {}, **bench.facts}
    contest = Contest(arguments, bench)
    contest.try_caches()
    contest.time_all()
    done = {row["budget"] for row in bench.rows if row["rival"] == OURS} | {
        None for row in bench.rows if row["rival"] == "full run"
    }
    if None not in done:
        contest.full_run()
    for budget in arguments.budgets:
        if budget not in done:
            # What a cut-off run has left of this budget is measured again.
            bench.rows = [row for row in bench.rows if row["budget"] != budget]
            contest.budget(budget)


if __name__ == "__main__":
    main()
