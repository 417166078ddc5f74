"""Time of a whole image against fidelity and quality on mini-sd: the full model, DeepCache, our parts, all together.

    python tools/bench_frontier.py                       # everything, alone on the machine: hours
    python tools/bench_frontier.py --budgets 0.5 0.33    # a part of it
    python tools/bench_frontier.py --quick               # whether it runs; writes nothing

Students come from `--members` (folders), or, without any, from `assemble mini-sd --members 2 --budget latency=0.7x`,
which is run first and kept among cached measurements. Of every role the best way within a budget, as measured, is
reported on held-out captions with seeds of their own: the nearest to the full run on validation prompts, and of some
roles also that whose pictures are best by themselves, as `optimize --criterion quality` has it, rivals' too
(`--criteria`). What is timed near a budget is timed again beside a full run of its own. Every way that is scored is
written to tools/results/frontier.json at once, and a run that was cut off, or that asks for other budgets, roles or
criteria, goes on behind the last one. Plots: frontier_psnr.svg, frontier_accuracy.svg, frontier_frechet.svg, and
frontier_switching.svg, which has the final latents' error of switching alone and of T-Stitch's order in the same time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from frontier_plots import write_plots
from frontier_quality import best_by_quality, shape_of, shortest_intervals
from inheritance_macs import planned_macs
from measuring import RESULTS, Resumable, check_alone, code_hash
from mini_sd.weights import bundled_weights

from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.files import cache_folder
from asdm_compress.core.provenance import content_hash
from asdm_compress.core.units import parse_budget
from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import compare_pairs, to_tensor
from asdm_compress.evaluation.quality import scene_features
from asdm_compress.inheritance.actions import FULL
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.places import find_places
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.latency import median_ratio
from asdm_compress.sampling.images import decode
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import Caption, caption_of
from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scenes.world import Scene, sample_scene
from asdm_compress.scheduling.goals import Goal
from asdm_compress.scheduling.rollouts import Judge
from asdm_compress.scheduling.switch_search import small_first
from asdm_compress.scheduling.switch_times import SKIP
from asdm_compress.scheduling.timing import time_runs
from asdm_compress.scheduling.ways import SOLVERS, Way
from asdm_compress.workflows.budget_search import FEWER, LONGER, TIGHTER, Search, open_instruments
from asdm_compress.workflows.calibrate import CalibrateSettings, keeps_in_time
from asdm_compress.workflows.candidates import Criterion, tried_steps
from asdm_compress.workflows.progress import Silent
from asdm_compress.workflows.switch import open_members

TEST_SEED, IMAGE_SEED = 5_151, 90_000
FULL_STEPS = (50, 25, 20, 15, 12, 10, 8, 6)
OURS = ("ddim", "dpm++")  # samplers of what takes long to measure
ROLES = ("full model", "DeepCache", "guidance reuse", "inheritance", "switching", "T-Stitch", "all together")
QUALITY_ROLES = ("full model", "DeepCache", "T-Stitch", "all together")
QUALITY_PROMPTS = 128  # on which is chosen where quality is the criterion, as in `optimize`
REPORTED = {"joint": "all together", "calibrated": "all together"}  # roles of the search under one name
ONCE_MORE = 0.2  # of the budget: how far from it a time may be for the way to be timed again
AT_ONCE = 6  # ways that are then timed beside one full run
MACS = (0.55, 1.2)  # times the budget: which share of the full run's MACs is worth timing
NEAR = 6  # steps around the predicted number of T-Stitch's small ones
NEAR_BY_QUALITY = 2  # where that counts: there are hundreds of ways then
STUDENTS = ("--members", "2", "--budget", "latency=0.7x", "--dtype", "fp32")
QUICK = (
    *("--steps", "5", "--calibration-prompts", "4", "--calibration-triples", "16", "--bands", "2", "--probes", "1"),
    *("--held-out-prompts", "2", "--slot", "none", "--narrow", "none", "--finest", "unit", "--refit", "none"),
    *("--repeats", "2"),
)


def full_model(search: Search, steps: Sequence[int]) -> Iterator[tuple[str, Way]]:
    """The full model at different numbers of steps."""
    for solver in SOLVERS:
        for count in steps:
            yield "full model", search.schedules.full_run(count, solver)


class Plain:
    """The teacher's pipeline without members, to count the MACs of ways with none."""

    def __init__(self, search: Search) -> None:
        parts = {**search.pipeline.components, "unet": next(iter(search.members.values()))}
        self.pipeline = type(search.pipeline)(**parts, requires_safety_checker=False)
        self.sampling = search.settings.sampling
        full = Schedule((FULL,) * self.sampling.steps)
        self.full = planned_macs(self.pipeline, full, self.sampling)

    def macs_share(self, way: Way) -> float:
        """A way's MACs over those of the full run."""
        assert way.rule is not None
        schedule = Schedule(way.rule.actions(way.steps))  # type: ignore[union-attr]
        return planned_macs(self.pipeline, schedule, replace(self.sampling, steps=way.steps)) / self.full


def rivals(search: Search, share: float, arguments: argparse.Namespace) -> Iterator[tuple[str, Way]]:
    """DeepCache's schedules (2312.00858) at every branch, guidance reuse alone, and T-Stitch's order (2402.14167).

    The first two of as many steps as ours are tried with too; those are timed whose MACs are about the time's share.
    And the full model with as many steps as fit in, of every sampler.
    """
    plain = Plain(search)
    steps, budget = arguments.steps, share * search.whole - search.outside
    cuts = range(sum(place.level == "cut" for place in find_places(search.pipeline.unet).values()))
    full = max(int((budget - search.times.outside) / search.times.teacher), 1)
    longer = [*(FEWER if search.by_quality else ()), *(n for n in arguments.longer if n > 1)]
    counts = dict.fromkeys([steps, *tried_steps(full, full, steps, longer)])
    yield from full_model(search, [n for n in (full - 1, full, full + 1) if 1 < n <= steps])
    for solver, count in product(SOLVERS, counts):
        rules = {f"uniform:{n},branch={branch},forecast=hold": "DeepCache" for n in range(2, 9) for branch in cuts}
        for n, forecast in product((2, 3, 5), ("hold", "linear")):
            rules[f"uniform:1,guidance={n},guidance-forecast={forecast}"] = "guidance reuse"
        for rule, role in rules.items() if count > 1 else ():
            way = Way(f"{rule}, {count} steps of {solver}", count, 0.0, parse_mode(rule), solver)
            if MACS[0] * share <= plain.macs_share(way) <= MACS[1] * share:
                yield role, way
    orders = product(SOLVERS, counts) if search.by_quality else product(arguments.solvers, [steps])
    for (solver, most), student in product(orders, search.students):
        order = small_first(student, search.teacher, most, search.times, budget)
        if order is None:
            continue
        # Some steps fewer and more of the student's too: which of them is in time is measured.
        fewest = order.count(student)
        near = NEAR_BY_QUALITY if search.by_quality else NEAR
        for count in range(max(fewest - near, 0), min(fewest + near, most) + 1):
            actions = (student,) * count + (search.teacher,) * (most - count)
            name = f"{count} of {most} steps of {solver} by {student.member} first"
            yield "T-Stitch", Way(name, most, search.times.run(actions), Schedule(actions), solver)


def parts(
    search: Search, share: float, roles: Sequence[str], arguments: argparse.Namespace
) -> Iterator[tuple[str, Way]]:
    """Our parts alone."""
    if search.by_quality:  # the teacher's own are among what is tried
        return
    budget, teacher = share * search.whole - search.outside, search.teacher
    light = [a for a in search.times.seconds if a.member == teacher.member and not a.is_whole]
    schedules = search.schedules
    for solver in arguments.solvers:
        run = (arguments.steps, solver, budget, search.reference)
        if "switching" in roles:
            yield from schedules.joint(*run, (teacher, *search.students, SKIP), "switching")
        if "inheritance" in roles:
            yield from schedules.joint(*run, (teacher, *light, SKIP), "inheritance")
            yield from schedules.calibrated(*run[:3], teacher, search.reference, "inheritance")


class Report:
    """Scores ways on test captions, and keeps what is known."""

    def __init__(self, search: Search, arguments: argparse.Namespace) -> None:
        self.search, self.arguments = search, arguments
        scenes, self.captions = held_out(arguments.test_prompts)
        seeds = replace(search.settings.sampling, seed=IMAGE_SEED)
        self.judge = Judge(search.pipeline, [c.text for c in self.captions], seeds)
        self.rendered, self.reader = scene_features(draw_scenes(scenes)), load_reader()
        quality = self._quality(to_tensor(self.judge.pictures))
        setting = {
            "sampling": {"steps": arguments.steps, "guidance": arguments.guidance},
            "prompts": {name: len(getattr(search.splits, name)) for name in ("calibration", "validation")},
            "test_prompts": len(self.captions),
            "quality_prompts": QUALITY_PROMPTS,
            "tried": {name: list(getattr(arguments, name)) for name in ("solvers", "longer")},
            "mini_sd": bundled_weights(),
            "weights": weights_hash(search.unet),  # of all members
        }
        device = search.pipeline.device
        self.bench = Resumable("frontier", __doc__ or "", device, setting=setting, writes=not arguments.quick).begin()
        self.bench.facts |= {
            "reference": {
                "scheduler": search.sampler, "steps": arguments.steps, "guidance": arguments.guidance,
                "seconds": search.whole, "outside_the_unet_loop": search.outside, **quality,
            },
            "members": {a.name: s / search.times.teacher for a, s in search.times.seconds.items()},
        }  # fmt: skip

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is scored."""
        return self.bench.rows

    def has(self, role: str, budget: float | None, criterion: str, key: str | None = None) -> bool:
        """Whether the best of a role within a budget is known, or whether a way is."""
        wanted = (role, budget, criterion)
        known = [row for row in self.rows if (row["role"], row["budget"], row["criterion"]) == wanted]
        return any(key in (None, row["key"]) for row in known)

    def add(self, role: str, way: Way, budget: float | None, criterion: str = "fidelity") -> None:
        """Score a way that a criterion chose, if it is not known yet."""
        if self.has(role, budget, criterion, way.key):
            return
        latents = self.judge.latents_of(way)
        errors = (latents - self.judge.full).double().square().flatten(1).mean(1)
        pictures = decode(self.search.pipeline, latents, self.judge.batch)
        psnr, _ = compare_pairs(pictures, self.judge.pictures)
        loop, whole = self._times(way)
        predicted = (way.seconds + self.search.outside) / self.search.whole if way.seconds else None
        self.bench.add(
            {
                "role": role, "way": way.name, "key": way.key, "budget": budget, "criterion": criterion,
                "loop_share": loop,
                "image_share": whole, "predicted_share": predicted, "psnr": float(np.mean(psnr)), "psnr_each": psnr,
                "latent_error": float(errors.mean()), "latent_error_each": errors.tolist(),
                **self._quality(to_tensor(pictures)),
            }
        )  # fmt: skip
        if self.bench.writes:
            write_plots(self.bench.content(), RESULTS)

    def _quality(self, images: Any) -> dict[str, Any]:
        """Captions that are wholly right, and the Fréchet distance to the rendered scenes of the same captions."""
        right = self.reader.accuracy(images, self.captions)
        return {
            "right": int(sum(right)), "count": len(self.captions), "right_each": [int(one) for one in right],
            "frechet": float(frechet_distance(scene_features(images), self.rendered)),
        }  # fmt: skip

    def _times(self, way: Way) -> tuple[float, float]:
        """The way's time over the reference's, in the sampling loop and for a whole image; taken in turns."""
        search, sampling = self.search, self.search.settings.sampling
        ways = (Way("full", sampling.steps, 0.0), way)
        full, own = time_runs(
            [w.loop(search.pipeline, search.one_batch, sampling) for w in ways], self.arguments.repeats
        )
        whole = [[s + search.outside for s in some] for some in (own, full)]
        return median_ratio(own, full), median_ratio(*whole)


def made_together(folder: Path) -> dict[str, Any] | None:
    """What `assemble --members` says of the students in a folder; None where it has not made them."""
    ladder, calibration = (folder / name for name in ("members.json", "calibration.json"))
    if not ladder.is_file():
        return None
    made, found = (json.loads(path.read_text(encoding="utf-8")) for path in (ladder, calibration))
    rungs = [{key: rung[key] for key in ("name", "latency", "damage")} for rung in made["ladder"]]
    wanted = ("goal", "time", "steps", "entrants", "verdict")
    return {"lineup": made["lineup"], "ladder": rungs, "calibration": {key: found[key] for key in wanted}}


def held_out(count: int) -> tuple[list[Scene], list[Caption]]:
    """Scenes of combinations that were never trained on, as many of one, two and three objects, and their captions."""
    rng = np.random.default_rng(TEST_SEED)
    scenes = [sample_scene(rng, 1 + i % 3, held_out=True) for i in range(count)]
    return scenes, [caption_of(scene, rng, complete=True) for scene in scenes]


def made_students(out: Path, more: Sequence[str]) -> list[str]:
    """Students that switch best together, as one folder, which is made once."""
    if not out.exists():
        command = [sys.executable, "-m", "asdm_compress", "assemble", "mini-sd", *STUDENTS, *more, "--out", str(out)]
        subprocess.run(command, check=True)
    return [str(out)]


def measure_budget(search: Search, report: Report, share: float, roles: Sequence[str], longer: Sequence[float]) -> None:
    """The best of every role within a share of the time, on validation prompts, is reported."""
    criterion = "quality" if search.by_quality else "fidelity"
    if search.by_quality:
        roles = [role for role in roles if role in QUALITY_ROLES]
    roles = [role for role in roles if not report.has(role, share, criterion)]
    if not roles:
        return
    found = [*rivals(search, share, report.arguments), *parts(search, share, roles, report.arguments)]
    if "all together" in roles:
        # The rest of what the search tries are what a user would do instead.
        found += [(role, way) for role, way in search.ways(share, longer) if role in REPORTED]
    found = [(role, way) for role, way in found if REPORTED.get(role, role) in roles]
    shares = timed(search, found, share)
    latest, taken = found, shares
    for _ in range(TIGHTER):  # those of ours that took slightly more, for less
        known = {(role, way.key) for role, way in found}
        latest = [
            new
            for new in search.schedules.tighter(latest, taken, share, search.outside)
            if (new[0], new[1].key) not in known
        ]
        taken = timed(search, latest, share)
        found, shares = found + latest, shares + taken
    groups: dict[str, list[Way]] = {}
    for (role, way), own in zip(found, shares, strict=True):
        if keeps_in_time(own, share):
            groups.setdefault(REPORTED.get(role, role), []).append(way)
    for role, ways in groups.items():
        if search.by_quality:
            best = best_by_quality(search, shortest_intervals(ways) if role == "DeepCache" else ways)
        else:
            scores = search.judge.scores(ways)
            best = ways[max(range(len(ways)), key=lambda i: scores[i].mean())]
        report.add(role, best, share, criterion)


def timed(search: Search, ways: Sequence[tuple[str, Way]], share: float) -> list[float]:
    """Shares of the time of a whole image; of many ways at once they only tell which are to be timed again."""
    if not ways:
        return []
    if search.by_quality:
        of_shape = {shape_of(way): way for _, way in ways}
        taken = dict(zip(of_shape, _timed(search, list(of_shape.values()), share), strict=True))
        return [taken[shape_of(way)] for _, way in ways]
    return _timed(search, [way for _, way in ways], share)


def _timed(search: Search, ways: Sequence[Way], share: float) -> list[float]:
    shares = search.shares(ways)
    near = [i for i, taken in enumerate(shares) if abs(taken / share - 1) <= ONCE_MORE] if len(ways) > AT_ONCE else []
    for first in range(0, len(near), AT_ONCE):
        some = near[first : first + AT_ONCE]
        for i, taken in zip(some, search.shares([ways[i] for i in some]), strict=True):
            shares[i] = taken
    return shares


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.7, 0.5, 0.4, 0.33, 0.25, 0.2])
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--criteria", nargs="+", choices=("fidelity", "quality"), default=["fidelity", "quality"])
    parser.add_argument("--members", nargs="*", default=None, help="folders of students, or of a switched pipeline")
    parser.add_argument("--solvers", nargs="+", default=OURS, help="of our parts and T-Stitch's order")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--full-steps", type=int, nargs="+", default=FULL_STEPS)
    parser.add_argument("--longer", type=float, nargs="+", default=LONGER, help="steps over the full ones in the time")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--prompts", type=int, default=16, help="to measure on; twice as many others are to choose on")
    parser.add_argument("--test-prompts", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    check_alone()
    if arguments.quick:
        arguments.budgets, arguments.steps, arguments.prompts, arguments.test_prompts = [0.8], 5, 2, 3
        arguments.repeats, arguments.full_steps, arguments.longer, arguments.solvers = 2, [4], [1.0], ["dpm++"]
    students = arguments.members
    if students is None:
        kind = "quick" if arguments.quick else "frontier"
        made_with = content_hash({"students": STUDENTS, "weights": bundled_weights(), "code": code_hash()})
        place = cache_folder() / f"students-{kind}-{made_with}"
        students = made_students(place, QUICK if arguments.quick else ())
    pipeline, members = open_members(["mini-sd", *students], LoadOptions(), Silent())
    together = made_together(Path(students[0]))
    prompts = arguments.prompts
    settings = CalibrateSettings(
        Goal(limit=parse_budget(["latency=0.5x"])[0]), SamplingSettings(arguments.steps, arguments.guidance), None,
        None, prompts, 2 * prompts, prompts, repeats=arguments.repeats,
    )  # fmt: skip
    search = Search(pipeline, members, settings, Silent())
    report = Report(search, arguments)
    report.bench.facts["students"] = together
    if "full model" in arguments.roles:
        for role, way in full_model(search, sorted(set(arguments.full_steps), reverse=True)):
            report.add(role, way, None)
    for criterion in arguments.criteria:
        if criterion == "quality":
            pipeline.register_modules(unet=next(iter(members.values())))
            count = 4 if arguments.quick else QUALITY_PROMPTS
            settings = replace(settings, validation_prompts=count, test_prompts=count)
            instruments = open_instruments(pipeline, settings, Criterion(criterion), Silent())
            search = Search(pipeline, members, settings, Silent(), instruments)
        for share in arguments.budgets:
            measure_budget(search, report, share, arguments.roles, arguments.longer)


if __name__ == "__main__":
    main()
