"""Full-size Stable Diffusion 1.5 on this machine, with random weights in bf16: what plans cost, and what a fit takes.

    python tools/bench_full_size.py     # alone on the machine

Damages of random weights mean nothing, so every edit's damage is taken to be the share of the parameters that it takes
away; whether the costs come out as predicted does not depend on that. Writes tools/results/full_size.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from measuring import Bench, measured

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.in_time import measured_ratio
from asdm_compress.assembly.option_fit import fitting_places
from asdm_compress.assembly.options import Option, find_options, slot_specs, teacher_costs, useful_options
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.search import solve
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.defaults import NARROW_SHARES
from asdm_compress.core.units import Limit
from asdm_compress.models.loading import load_unet
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.profile import ProfileSettings, profile
from asdm_compress.profiling.slot_costs import places_of, slot_costs
from asdm_compress.sampling.run import GuidedInputs

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
MODEL, TOKENS = "sd15", 77
FITTED = (
    ("down_blocks.3.resnets.0", "conv3x3"),
    ("down_blocks.0.attentions.0", "conv3x3*8@timestep"),
    ("mid_block", "conv1x1*8@timestep"),
    ("down_blocks.3.resnets.0", "narrow0.5"),
)


def main() -> None:
    """Profile, plan for every budget, build and time the students, and fit single edits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--triples", type=int, default=16, help="calibration triples of the single fits")
    arguments = parser.parse_args()
    with measured("full_size", __doc__) as bench:
        measure(bench, arguments)


def measure(bench: Bench, arguments: argparse.Namespace) -> None:
    """Everything; what is known is on disk as soon as it is."""
    settings = ProfileSettings(text_tokens=TOKENS, repeats=arguments.repeats, channels_last=True)
    result = bench.facts
    result |= {"model": MODEL, "dtype": "bf16"}
    teacher = load_unet(MODEL, LoadOptions(dtype=torch.bfloat16, random_weights=True))
    began = time.monotonic()
    costs = profile(teacher, settings, MODEL)
    result["profile_seconds"] = round(time.monotonic() - began, 1)
    places = fitting_places(teacher, places_of(teacher, slot_specs("auto", 8, "timestep", []), NARROW_SHARES))
    began = time.monotonic()
    slots = slot_costs(teacher, places, settings, costs)
    result["slot_costs_seconds"] = round(time.monotonic() - began, 1)
    options = useful_options(find_options(teacher, costs, places, slots), [Limit("latency", 0.5, True)])
    result |= {"teacher_seconds": costs.latency, "options": len(options), "plans": []}
    print(json.dumps(result), flush=True)
    for share in BUDGETS:
        result["plans"].append(_planned(teacher, options, costs, share, settings))
        print(json.dumps(result["plans"][-1]), flush=True)
        bench.write()
    result["fits"] = []
    for site, edit in FITTED:
        result["fits"].append(_fitted(teacher, site, edit, arguments.triples))
        print(json.dumps(result["fits"][-1]), flush=True)
        bench.write()


def _planned(
    teacher: UNet2DConditionModel, options: tuple[Option, ...], costs: Any, share: float, settings: ProfileSettings
) -> dict[str, Any]:
    whole = teacher_costs(costs)
    damages = {o.name: max(o.savings["params"], 0) / costs.parameters + 1e-4 for o in options}
    began = time.monotonic()
    solution = solve(options, damages, whole, [Limit("latency", share, True)])
    solved = time.monotonic()
    student = assemble(teacher, solution.plan)
    built = time.monotonic()
    ratio = measured_ratio(teacher, student, settings)
    predicted = solution.costs["latency"] / costs.latency
    return {
        "budget": share,
        "edits": dict(solution.plan.edits),
        "predicted_latency_ratio": round(predicted, 4),
        "measured_latency_ratio": round(ratio, 4),
        "off": round(ratio / predicted - 1, 4),
        "parameters": sum(p.numel() for p in student.parameters()),
        "solve_seconds": round(solved - began, 1),
        "build_seconds": round(built - solved, 1),
        "peak_gib": _peak_gib(),
    }


def _fitted(teacher: UNet2DConditionModel, site: str, edit: str, triples: int) -> dict[str, Any]:
    """One edit fitted on random latents: the time does not depend on what is in them."""
    generator = torch.Generator().manual_seed(0)
    shape, width = (triples, 4, 64, 64), teacher.config["cross_attention_dim"]
    inputs = GuidedInputs(
        torch.randn(shape, generator=generator).to(teacher.dtype),
        torch.linspace(999, 1, triples),
        torch.randn(triples, 2, TOKENS, width, generator=generator).to(teacher.dtype),
        7.5,
    )
    bands = torch.arange(triples) * 8 // triples
    calibration = Calibration(inputs, bands, torch.arange(triples), (1 / 8,) * 8, tuple(range(875, 0, -125)))
    began = time.monotonic()
    fit_plan(teacher, Plan({site: edit}), calibration)
    return {"site": site, "edit": edit, "triples": triples, "seconds": round(time.monotonic() - began, 1),
            "peak_gib": _peak_gib()}  # fmt: skip


def _peak_gib() -> float:
    """The most memory that the process has had so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    main()
