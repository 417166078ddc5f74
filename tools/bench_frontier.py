"""Time of a whole image against fidelity and quality on mini-sd: the full model, DeepCache, our parts, all together.

    python tools/bench_frontier.py                       # everything, alone on the machine
    python tools/bench_frontier.py --budgets 0.5 0.33    # a part of it
    python tools/bench_frontier.py --quick               # whether it runs; writes nothing

Students come from `--members` (folders), or, without any, from bundled recipes that are applied first. Every way that
is scored is written to tools/results/frontier.json at once, and a run that was cut off goes on behind the last one.
Plots: frontier_psnr.svg, frontier_accuracy.svg.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measuring import check_alone

from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.core.units import parse_budget
from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import compare_pairs, to_tensor
from asdm_compress.evaluation.quality import scene_features
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.latency import median_ratio
from asdm_compress.reporting.plots import as_svg
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scheduling.goals import Goal
from asdm_compress.scheduling.rollouts import Judge
from asdm_compress.scheduling.switch_search import small_first
from asdm_compress.scheduling.switch_times import SKIP
from asdm_compress.scheduling.timing import time_runs
from asdm_compress.scheduling.ways import Way
from asdm_compress.workflows.calibrate import CalibrateSettings
from asdm_compress.workflows.candidates import Search
from asdm_compress.workflows.progress import Silent
from asdm_compress.workflows.switch import open_members

RESULTS = Path(__file__).parent / "results"
TEST_SEED, IMAGE_SEED = 5_151, 90_000
FULL_STEPS = (50, 25, 20, 15, 10, 8)
RECIPES = ("mini-sd-latency-0.7x",)


def full_model(search: Search, steps: tuple[int, ...]) -> Iterator[tuple[str, Way]]:
    """The full model at different numbers of steps."""
    for solver in ("dpm++", "unipc"):
        for count in steps:
            rule = Schedule((search.teacher,) * count)
            yield "full model", Way(f"{count} steps of {solver}", count, search.times.full(count), rule, solver)


def caches(search: Search, share: float, steps: int) -> Iterator[tuple[str, Way]]:
    """DeepCache's schedules (2312.00858) that fit, at every branch and of two samplers; and guidance reuse alone."""
    for solver in ("ddim", "dpm++"):
        for interval in range(2, 9):
            for branch in (0, 1, 2):
                rule = f"uniform:{interval},branch={branch},forecast=hold"
                yield "DeepCache", Way(f"{rule}, {solver}", steps, 0.0, parse_mode(rule), solver)
        for every in (2, 3, 5):
            rule = f"uniform:1,guidance={every}"
            yield "guidance reuse", Way(f"{rule}, {solver}", steps, 0.0, parse_mode(rule), solver)


def ours(search: Search, share: float, steps: int) -> Iterator[tuple[str, Way]]:
    """Our parts alone, all together, and T-Stitch's order in the same time."""
    budget = share * search.whole - search.outside
    teacher, students = search.teacher, search.students
    light = [a for a in search.times.seconds if a.member == teacher.member and not a.is_whole]
    for solver in ("ddim", "dpm++"):
        parts = {
            "switching": (teacher, *students), "inheritance": (teacher, *light, SKIP),
        }  # fmt: skip
        for role, choices in parts.items():
            yield from search.joint(steps, solver, budget, choices, role)
        for student in students:
            order = small_first(student, teacher, steps, search.times, budget)
            if order is not None:
                seconds = search.times.run(order)
                yield "T-Stitch", Way(f"T-Stitch, {steps} steps of {solver}", steps, seconds, Schedule(order), solver)
    yield from (("all together", way) for role, way in search.ways(share) if role == "joint")


class Report:
    """Scores ways on test captions, and keeps what is known."""

    def __init__(self, search: Search, arguments: argparse.Namespace, path: Path | None) -> None:
        self.search, self.arguments, self.path = search, arguments, path
        self.captions = sample_captions(arguments.test_prompts, TEST_SEED)
        seeds = replace(search.settings.sampling, seed=IMAGE_SEED)
        self.judge = Judge(search.pipeline, [c.text for c in self.captions], seeds)
        self.features, self.reader = scene_features(to_tensor(self.judge.pictures)), load_reader()
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def add(self, role: str, way: Way, budget: float | None) -> None:
        """Score a way, if it is not known yet."""
        if any(row["key"] == way.key and row["budget"] == budget and row["role"] == role for row in self.rows):
            return
        pictures = self.judge.pictures_of(way)
        psnr, _ = compare_pairs(pictures, self.judge.pictures)
        images = to_tensor(pictures)
        loop, whole = self._times(way)
        self.rows.append(
            {
                "role": role, "way": way.name, "key": way.key, "budget": budget, "loop_share": loop,
                "image_share": whole, "psnr": sum(psnr) / len(psnr), "psnr_each": psnr,
                "right": int(sum(self.reader.accuracy(images, self.captions))), "count": len(pictures),
                "frechet": float(frechet_distance(scene_features(images), self.features)),
            }
        )  # fmt: skip
        print(f"{role}: {way.name}, {whole:.3f}x, {self.rows[-1]['psnr']:.1f} dB", flush=True)
        self.write()

    def _times(self, way: Way) -> tuple[float, float]:
        """The way's time over the reference's, in the sampling loop and for a whole image; taken in turns."""
        search, sampling = self.search, self.search.settings.sampling
        ways = (Way("full", sampling.steps, 0.0), way)
        full, own = time_runs(
            [w.loop(search.pipeline, search.one_batch, sampling) for w in ways], self.arguments.repeats
        )
        whole = [[s + search.outside for s in some] for some in (own, full)]
        return median_ratio(own, full), median_ratio(*whole)

    def write(self) -> None:
        """Everything so far, and the plots."""
        if self.path is None:
            return
        content = {
            "processor": processor_name(), "versions": versions(),
            "reference": f"{self.search.sampler}, {self.search.settings.sampling.steps} steps",
            "reference_right": int(sum(self.reader.accuracy(to_tensor(self.judge.pictures), self.captions))),
            "rows": self.rows,
        }  # fmt: skip
        self.path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        for name, key in (("psnr", "psnr"), ("accuracy", "right")):
            figure = Figure(figsize=(7, 4.5))
            axes = figure.add_subplot()
            for role in dict.fromkeys(row["role"] for row in self.rows):
                points = sorted((row["image_share"], row[key]) for row in self.rows if row["role"] == role)
                axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=role, markersize=4)
            axes.set_xlabel("time of a whole image, over the full run's")
            axes.set_ylabel("PSNR to the full run, dB" if key == "psnr" else f"of {len(self.captions)} prompts right")
            axes.legend(frameon=False)
            (RESULTS / f"frontier_{name}.svg").write_text(as_svg(figure), encoding="utf-8")


def made_students(folder: Path) -> list[str]:
    """Students of the bundled recipes."""
    for recipe in RECIPES:
        subprocess.run(
            [sys.executable, "-m", "asdm_compress", "apply", recipe, "mini-sd", "--out", str(folder / recipe)],
            check=True,
        )
    return [str(folder / recipe) for recipe in RECIPES]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.7, 0.5, 0.4, 0.33, 0.25, 0.2])
    parser.add_argument("--members", nargs="*", default=None, help="folders of students")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--test-prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    check_alone()
    counts = FULL_STEPS
    if arguments.quick:
        arguments.budgets, arguments.steps, arguments.prompts, arguments.test_prompts = [0.6], 5, 2, 2
        arguments.repeats, counts = 2, (4,)
    with tempfile.TemporaryDirectory() as folder:
        students = made_students(Path(folder)) if arguments.members is None else arguments.members
        pipeline, members = open_members(["mini-sd", *students], LoadOptions(), Silent())
    prompts = arguments.prompts
    settings = CalibrateSettings(
        Goal(limit=parse_budget(["latency=0.5x"])[0]), SamplingSettings(arguments.steps, arguments.guidance), None,
        None, prompts, prompts, prompts, repeats=arguments.repeats,
    )  # fmt: skip
    search = Search(pipeline, members, settings, Silent())
    report = Report(search, arguments, None if arguments.quick else RESULTS / "frontier.json")
    for role, way in full_model(search, counts):
        report.add(role, way, None)
    for share in arguments.budgets:
        groups: dict[str, list[Way]] = {}
        for role, way in caches(search, share, arguments.steps):
            groups.setdefault(role, []).append(way)
        for role, way in ours(search, share, arguments.steps):
            groups.setdefault(role, []).append(way)
        for role, ways in groups.items():
            # Of each the best on validation prompts within the time that was measured.
            shares = search.shares(ways)
            within = [way for way, taken in zip(ways, shares, strict=True) if taken <= share * 1.01]
            if within:
                scores = search.judge.scores(within)
                report.add(role, within[max(range(len(within)), key=lambda i: scores[i].mean())], share)


if __name__ == "__main__":
    main()
