"""Our plans against those that others would make, at the same measured latency, without any training.

    python tools/bench_assembly.py      # alone on the machine; about half an hour on two cores

Every row is measured on held-out prompts and seeds. Writes tools/results/assembly.json and assembly.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from rival_plans import BK_PATTERNS, greedy, knapsack, random_plans, within_measured, without_convolutions

from asdm_compress.assembly.calibration import Calibration, record
from asdm_compress.assembly.damage import compare_predictions, measure_plan
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.slot_start import fit_plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.assembly.verify import Search, measured_ratio, search_verified
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.core.units import Limit
from asdm_compress.evaluation.fidelity import to_tensor
from asdm_compress.evaluation.quality import assess, frechet_distance, scene_features
from asdm_compress.models.loading import LoadOptions, load_pipeline
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.images import Samples, sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.workflows.assemble import with_unet
from asdm_compress.workflows.plan import PlanResult, PlanSettings, plan

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
HELD_OUT_SEED, IMAGE_SEED = 4_242, 70_000
RANDOM_PLANS = 100


class Judge:
    """Held-out prompts, and the teacher's pictures of them."""

    def __init__(self, pipeline: StableDiffusionPipeline, count: int, guidance: float, found: PlanResult) -> None:
        self.pipeline, self.teacher = pipeline, pipeline.unet
        self.captions = sample_captions(count, HELD_OUT_SEED)
        self.prompts = [c.text for c in self.captions]
        self.settings = SamplingSettings(25, guidance, IMAGE_SEED)
        weights = found.calibration.band_weights
        self.unseen: Calibration = record(pipeline, self.prompts, self.settings, band_weights=weights)
        self.pictures: Samples = sample(pipeline, self.prompts, self.settings)
        self.features: np.ndarray = scene_features(to_tensor(self.pictures.images))

    def __call__(self, student: Any) -> dict[str, Any]:
        """What a student is worth."""
        pictures = sample(with_unet(self.pipeline, student), self.prompts, self.settings)
        quality = assess(self.pictures, pictures, self.captions)
        return {
            "damage": compare_predictions(self.teacher, student, self.unseen).total,
            **quality.as_json(),
            "frechet_to_teacher": frechet_distance(scene_features(to_tensor(pictures.images)), self.features),
            "parameters": sum(p.numel() for p in student.parameters()),
        }


def main() -> None:
    """Measure every maker of plans at every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--guidance", type=float, default=SamplingSettings().guidance)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    arguments = parser.parse_args()
    pipeline = load_pipeline("mini-sd", LoadOptions())
    pipeline.set_progress_bar_config(disable=True)
    teacher = pipeline.unet
    settings = PlanSettings(ProfileSettings(repeats=15), SamplingSettings(25, arguments.guidance))
    found = plan(pipeline, "latency=0.9x", settings)
    shape = replace(settings.profile, text_tokens=int(pipeline.tokenizer.model_max_length))
    judge = Judge(pipeline, arguments.prompts, arguments.guidance, found)
    damages = {name: damage.total for name, damage in found.damages.items()}
    fitting, measuring = found.calibration.parts()

    def ratio_of(student: Any) -> float:
        return measured_ratio(teacher, student, shape)

    rows: list[dict[str, Any]] = []

    def keep(budget: float | None, maker: str, chosen: Plan, ratio: float, student: Any, **more: Any) -> None:
        row = {"budget": budget, "maker": maker, "latency_ratio": round(ratio, 4), **judge(student), **more}
        rows.append({**row, "edits": dict(chosen.edits)})
        print(json.dumps(row), flush=True)

    def search(budget: float, maker: str, options: Sequence[Option]) -> None:
        began = time.monotonic()
        limits = [Limit("latency", budget, True)]
        try:
            ours = search_verified(
                Search(teacher, found.profile, options, found.damages, limits, shape, found.calibration)
            )
        except AsdmError as error:
            rows.append({"budget": budget, "maker": maker, "infeasible": True, "why": str(error)})
            return
        keep(
            budget, maker, ours.solution.plan, ours.latency_ratio, ours.student,
            predicted_damage=ours.solution.damage,
            measured_damage=ours.measured_damage,
            pairs=ours.pairs,
            predicted_latency_ratio=round(ours.solution.costs["latency"] / found.profile.latency, 4),
            seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip

    for name, pattern in BK_PATTERNS.items():
        student = assemble(teacher, pattern)
        ratio = ratio_of(student)
        keep(round(ratio, 3), name, pattern, ratio, student)
        search(round(ratio, 3), "ours", found.options)
    for budget in arguments.budgets:
        makers = {
            "greedy": lambda share: greedy(found.options, damages, found.profile, share),
            "drop-only knapsack": lambda share: knapsack(found.options, damages, found.profile, share),
            "best of 100 random": lambda share: _best_random(teacher, found, share, measuring),
        }
        for name, maker in makers.items():
            made = within_measured(maker, budget, ratio_of, teacher)
            if made is None:
                rows.append({"budget": budget, "maker": name, "infeasible": True})
                continue
            keep(budget, name, made[0], made[1], assemble(teacher, made[0]))
        search(budget, "ours without convolutions", without_convolutions(found.options))
        search(budget, "ours", found.options)
    _fitted_patterns(teacher, fitting, ratio_of, keep)
    _write(rows, arguments.prompts, arguments.guidance)


def _best_random(teacher: Any, found: PlanResult, share: float, calibration: Calibration) -> Plan | None:
    """The best of many on a part of the calibration that is large enough to rank them."""
    few = calibration.only(torch.arange(len(calibration)) % 2 == 0)
    plans = list(random_plans(found.options, found.profile, share, RANDOM_PLANS, seed=round(1000 * share)))
    return min(plans, key=lambda p: measure_plan(teacher, p, few).total) if plans else None


def _fitted_patterns(teacher: Any, calibration: Calibration, ratio_of: Any, keep: Any) -> None:
    """BK-SDM's own removals with our convolutions in the holes: what the fit alone does."""
    for edit in ("conv1x1*8@timestep", "conv3x3*8@timestep"):
        pattern = Plan(dict.fromkeys(BK_PATTERNS["bk-sdm-base"].edits, edit))
        student = assemble(teacher, pattern, fit_plan(teacher, pattern, calibration))
        keep(None, f"bk-sdm-base with {edit}", pattern, ratio_of(student), student)


def _write(rows: list[dict[str, Any]], prompts: int, guidance: float) -> None:
    RESULTS.mkdir(exist_ok=True)
    content = {"prompts": prompts, "guidance": guidance, "device": processor_name(), "versions": versions()}
    (RESULTS / "assembly.json").write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")
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


if __name__ == "__main__":
    main()
