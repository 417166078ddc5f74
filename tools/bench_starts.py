"""What slot convolutions start from: holes, zero, random and copied kernels, and closed-form fits of every shape.

    python tools/bench_starts.py        # alone on the machine; writes tools/results/starts.json

BK-SDM-base's removals on `mini-sd`, a convolution in every hole, no training; on held-out prompts and seeds.
"""

from __future__ import annotations

import time

from measuring import Bench, measured
from mini_sd.weights import bundled_weights
from rival_plans import BK_PATTERNS

from asdm_compress.assembly.calibration import record
from asdm_compress.assembly.damage import measure_plan
from asdm_compress.assembly.other_starts import copied_start, random_start
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.defaults import CALIBRATION_PROMPTS
from asdm_compress.evaluation.quality import assess
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.workflows.assemble import with_unet

PROMPTS = 24
SETTINGS, UNSEEN = SamplingSettings(), SamplingSettings(seed=80_000)
SHAPES = ("conv1x1", "conv1x1*8@timestep", "separable3x3*8@timestep", "conv3x3-rank16*8@timestep", "conv3x3",
          "conv3x3*8@timestep")  # fmt: skip


def main() -> None:
    """Alone on the machine: fits are timed too."""
    with measured("starts", __doc__) as bench:
        bench.facts |= {"prompts": PROMPTS, "mini_sd": bundled_weights()}
        measure(bench)


def measure(bench: Bench) -> None:
    """Measure every start."""
    pipeline = load_pipeline("mini-sd", LoadOptions())
    pipeline.set_progress_bar_config(disable=True)
    teacher = pipeline.unet
    seen = [caption.text for caption in sample_captions(CALIBRATION_PROMPTS, 1, held_out=False)]
    captions = sample_captions(PROMPTS, 5_151)
    calibration = record(pipeline, seen, SETTINGS)
    others = record(pipeline, [c.text for c in captions], UNSEEN, band_weights=calibration.band_weights)
    pictures = sample(pipeline, [c.text for c in captions], UNSEEN)

    def keep(start: str, edit: str, weights: SlotWeights, seconds: float | None = None) -> None:
        plan = Plan(dict.fromkeys(BK_PATTERNS["bk-sdm-base"].edits, edit))
        student = assemble(teacher, plan, weights)
        quality = assess(pictures, sample(with_unet(pipeline, student), [c.text for c in captions], UNSEEN), captions)
        damage = measure_plan(teacher, plan, others, weights).total
        psnr = quality.as_json()["psnr"]
        bench.add({"start": start, "edit": edit, "damage": damage, "psnr": psnr, "fit_seconds": seconds})

    keep("hole", "drop", {})
    shown = "conv3x3*8@timestep"
    pattern = Plan(dict.fromkeys(BK_PATTERNS["bk-sdm-base"].edits, shown))
    keep("zero", shown, {})
    keep("random", shown, random_start(teacher, pattern))
    keep("copied from kept convolutions", shown, copied_start(teacher, pattern))
    for edit in SHAPES:
        began = time.perf_counter()
        weights = fit_plan(teacher, Plan(dict.fromkeys(pattern.edits, edit)), calibration)
        keep("fitted", edit, weights, round(time.perf_counter() - began, 1))


if __name__ == "__main__":
    main()
