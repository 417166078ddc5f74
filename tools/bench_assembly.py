"""Our plans against those that others would make, at the same measured latency, without any training.

    python tools/bench_assembly.py                          # alone on the machine
    python tools/bench_assembly.py --budgets 0.6 --extras   # a part of it

Every row is measured on held-out prompts and seeds: pictures on the first of those that damage is measured on, since
the damage of a few prompts is mostly that of one or two of them. Writes tools/results/assembly.json and assembly.svg.
Rows that lie there and are of the same prompts, machine and versions stay until they are measured anew; with those of
others it ends, until the file is taken away. Every row says by a hash which code of the search it was measured with.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from measuring import RESULTS, Resumable, check_alone, code_hash
from mini_sd.weights import bundled_weights
from rival_plans import (
    BK_PATTERNS,
    greedy,
    knapsack,
    pruned_ratios,
    random_plans,
    torch_pruned,
    within_measured,
    without_weights,
)

from asdm_compress.assembly.attempts import Search
from asdm_compress.assembly.calibration import Calibration, Effort, record
from asdm_compress.assembly.damage import compare_predictions, measure_plan, predictions
from asdm_compress.assembly.in_time import measured_ratio
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.assembly.verify import search_verified
from asdm_compress.core.edits import EXACT
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.units import Limit
from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import to_tensor
from asdm_compress.evaluation.quality import assess, scene_features
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.images import Samples, sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.workflows.assemble import with_unet
from asdm_compress.workflows.plan import Measured, PlanSettings, measure
from asdm_compress.workflows.progress import Silent

BUDGETS = (0.7, 0.9, 0.8, 0.6, 0.5)
HELD_OUT_SEED, IMAGE_SEED = 4_242, 70_000
RANDOM_PLANS = 100
LAST_PLANS = 10  # of which are measured on everything
SHOWN = 0.7  # at this budget the search is also made without anything that is fitted, and without exact edits
EXTRAS = ("cuts", "exact", "patterns")  # these searches; BK-SDM's removals, as they are and fitted
OWN = ("bench_assembly", "rival_plans")


@dataclass(frozen=True, slots=True)
class Counts:
    """How many held-out prompts pictures are made of, and damages are measured on."""

    pictures: int
    damages: int


class Judge:
    """Held-out prompts, and the teacher's pictures of them."""

    def __init__(self, pipeline: StableDiffusionPipeline, counts: Counts, guidance: float, found: Measured) -> None:
        self.pipeline, self.teacher = pipeline, pipeline.unet
        captions = sample_captions(max(counts.pictures, counts.damages), HELD_OUT_SEED)
        self.captions = captions[: counts.pictures]
        self.prompts = [c.text for c in self.captions]
        self.settings = SamplingSettings(25, guidance, IMAGE_SEED)
        weights, texts = found.calibration.band_weights, [c.text for c in captions[: counts.damages]]
        effort = Effort(moments=2 * counts.damages)
        self.unseen: Calibration = record(pipeline, texts, self.settings, band_weights=weights, effort=effort)
        self.reference = predictions(self.teacher, self.unseen)
        self.pictures: Samples = sample(pipeline, self.prompts, self.settings)
        self.features: np.ndarray = scene_features(to_tensor(self.pictures.images))

    def __call__(self, student: Any) -> dict[str, Any]:
        """What a student is worth."""
        pictures = sample(with_unet(self.pipeline, student), self.prompts, self.settings)
        quality = assess(self.pictures, pictures, self.captions)
        return {
            "damage": compare_predictions(self.teacher, student, self.unseen, self.reference).total,
            **quality.as_json(),
            "frechet_to_teacher": frechet_distance(scene_features(to_tensor(pictures.images)), self.features),
            "parameters": sum(p.numel() for p in student.parameters()),
        }


class Bench:
    """The rows so far, and what they are measured with."""

    def __init__(self, counts: Counts, guidance: float) -> None:
        setting = {
            "prompts": counts.pictures, "damage_prompts": counts.damages, "guidance": guidance,
            "mini_sd": bundled_weights(),
        }  # fmt: skip
        self.results = Resumable("assembly", __doc__ or "", torch.device("cpu"), setting=setting).begin()
        pipeline = load_pipeline("mini-sd", LoadOptions())
        pipeline.set_progress_bar_config(disable=True)
        self.teacher = pipeline.unet
        settings = PlanSettings(ProfileSettings(repeats=15), SamplingSettings(25, guidance))
        limits = [Limit("latency", SHOWN, True)]  # whose number says nothing, only that it is time
        self.found, self.refit = measure(pipeline, limits, settings, Silent(), "mini-sd"), settings.refit
        self.judge = Judge(pipeline, counts, guidance, self.found)
        # The rivals cut and leave it at that: they are given the damages of cuts that nothing makes up for.
        self.damages = {name: damage.total for name, damage in self.found.plain_damages.items()}
        self.code = code_hash(*OWN)
        self.measuring = self.found.calibration.for_options()[1]

    @cached_property
    def pruned(self) -> dict[float, float]:
        """The time that torch-pruning's narrowing leaves, by the share that it prunes."""
        return pruned_ratios(self.teacher, self.ratio_of, self.found.shape.tokens)

    def ratio_of(self, student: Any) -> float:
        """Measured latency over the teacher's."""
        return measured_ratio(self.teacher, student, self.found.shape)

    def keep(self, budget: float | None, maker: str, chosen: Plan, student: Any, **more: Any) -> None:
        """Measure a student and write its row down.

        Its time too, anew: those that led to it were in time when it was looked for, some by luck.
        """
        ratio = 1.0 if student is self.teacher else self.ratio_of(student)
        row = {
            "budget": budget, "maker": maker, "latency_ratio": round(ratio, 4), **self.judge(student), **more,
            "code": self.code,
        }  # fmt: skip
        self.put({**row, "edits": dict(chosen.edits)})

    def put(self, row: Mapping[str, Any]) -> None:
        """A row in the place of an older one of the same maker and budget."""
        what = (row["budget"], row["maker"])
        self.results.rows = [old for old in self.results.rows if (old["budget"], old["maker"]) != what]
        self.results.add(row)
        _draw(self.results.rows)

    def search(self, budget: float, maker: str, options: Sequence[Option]) -> None:
        """Our own plan."""
        began = time.monotonic()
        found, limits = self.found, [Limit("latency", budget, True)]
        try:
            ours = search_verified(
                Search(
                    self.teacher,
                    found.profile,
                    options,
                    found.damages,
                    limits,
                    found.shape,
                    found.calibration,
                    self.refit,
                    plain_damages=found.plain_damages,
                )
            )
        except AsdmError as error:
            self.put({"budget": budget, "maker": maker, "infeasible": True, "why": str(error)})
            return
        self.keep(
            budget, maker, ours.solution.plan, ours.student,
            predicted_damage=ours.predicted_damage,
            measured_damage=ours.measured_damage,
            proven=ours.solution.proven,
            pairs_of_edits=ours.pairs,
            predicted_latency_ratio=round(ours.predicted_latency_ratio, 4),
            seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip

    def rivals(self, budget: float) -> None:
        """The plans that others would make."""
        found = self.found
        makers = {
            "greedy": lambda share: greedy(found.options, self.damages, found.profile, share),
            "drop-only knapsack": lambda share: knapsack(found.options, self.damages, found.profile, share),
            "best of 100 random": lambda share: _best_random(self.teacher, found, share, self.measuring),
        }
        for name, maker in makers.items():
            made = within_measured(maker, budget, self.ratio_of, self.teacher)
            if made is None:
                self.put({"budget": budget, "maker": name, "infeasible": True})
            else:
                self.keep(budget, name, made[0], assemble(self.teacher, made[0]))
            if made is not None and name == "drop-only knapsack":
                weights = fit_plan(self.teacher, made[0], found.calibration, refit=self.refit)
                student = assemble(self.teacher, made[0], weights)
                self.keep(budget, f"{name}, with our refit", made[0], student)
        maker = "torch-pruning by magnitude"
        kept = [share for share, ratio in self.pruned.items() if ratio <= budget * 1.01]
        share = kept[0] if kept else min(self.pruned, key=self.pruned.__getitem__)
        student = torch_pruned(self.teacher, share, self.found.shape.tokens)
        if kept:
            self.keep(budget, maker, Plan({}), student, pruned_share=share)
        else:
            parameters = sum(p.numel() for p in student.parameters())
            self.put(
                {"budget": budget, "maker": maker, "infeasible": True, "fastest": self.pruned[share],
                 "pruned_share": share, "parameters": parameters}
            )  # fmt: skip


def main() -> None:
    """Measure every maker of plans at every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts that pictures are made of")
    parser.add_argument("--damage-prompts", type=int, default=256, help="held-out prompts that damage is measured on")
    parser.add_argument("--guidance", type=float, default=SamplingSettings().guidance)
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--extras", nargs="*", choices=EXTRAS, default=EXTRAS)
    parser.add_argument("--rivals-alone", action="store_true", help="leave our own plans as they were measured before")
    arguments = parser.parse_args()
    check_alone()
    bench = Bench(Counts(arguments.prompts, arguments.damage_prompts), arguments.guidance)
    bench.keep(1.0, "teacher", Plan({}), bench.teacher)
    for budget in arguments.budgets:
        if not arguments.rivals_alone:
            bench.search(budget, "ours", bench.found.options)
        bench.rivals(budget)
    if "cuts" in arguments.extras:
        bench.search(SHOWN, "ours, only taking out", without_weights(bench.found.options))
    if "exact" in arguments.extras:
        rest = [option for option in bench.found.options if option.edit not in EXACT]
        bench.search(SHOWN, "ours, without exact edits", rest)
    if "patterns" in arguments.extras:
        for name, pattern in BK_PATTERNS.items():
            bench.keep(None, name, pattern, assemble(bench.teacher, pattern))
        _fitted_patterns(bench)


def _best_random(teacher: Any, found: Measured, share: float, calibration: Calibration) -> Plan | None:
    """The best of many on what single edits are measured on, of those that a fourth of it says are among the best."""
    plans = list(random_plans(found.options, found.profile, share, RANDOM_PLANS, seed=round(1000 * share)))
    few = calibration.only(torch.arange(len(calibration)) % 4 == 0)
    for part, kept in ((few, LAST_PLANS), (calibration, 1)):
        wanted = predictions(teacher, part)
        damages = {id(p): measure_plan(teacher, p, part, None, wanted).total for p in plans}
        plans = sorted(plans, key=lambda p: damages[id(p)])[:kept]
    return plans[0] if plans else None


def _fitted_patterns(bench: Bench) -> None:
    """BK-SDM's own removals with what stays refitted, without and with our convolutions in the holes."""
    for edit in ("drop", "conv1x1*8@timestep", "conv3x3*8@timestep"):
        pattern = Plan(dict.fromkeys(BK_PATTERNS["bk-sdm-base"].edits, edit))
        weights = fit_plan(bench.teacher, pattern, bench.found.calibration, refit=bench.refit)
        maker = "bk-sdm-base, refitted" if edit == "drop" else f"bk-sdm-base with {edit}, refitted"
        bench.keep(None, maker, pattern, assemble(bench.teacher, pattern, weights))


def _draw(rows: Sequence[Mapping[str, Any]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, what, label in zip(
        axes, ("damage", "psnr"), ("damage, held out", "PSNR to the teacher, dB"), strict=True
    ):
        for maker in dict.fromkeys(row["maker"] for row in rows):
            points = sorted((r["latency_ratio"], r[what]) for r in rows if r["maker"] == maker and what in r)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=maker)
        axis.set_xlabel("UNet latency / teacher's")
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(RESULTS / "assembly.svg")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
