"""How long the students of recipes take at full size, beside their teacher, with random weights in bf16.

    python tools/bench_recipes.py               # alone on the machine; then: python tools/make_recipes.py
    python tools/bench_recipes.py --all         # the recipes that are there, too
    OMP_NUM_THREADS=1 python tools/bench_recipes.py --processor-time    # where other things are running
    python tools/bench_recipes.py --by-steps    # on a machine whose pace changes from second to second
    python tools/bench_recipes.py --models sd21-base --results tools/results/recipes_sd21.json    # on another machine

For every latency budget it looks for the first rung of `ladder.py` that keeps it. Writes tools/results/recipes.json
after every measurement; what it has is not measured again, unless `--again`. A file is of one machine and one way of
timing, and one of another is put aside; the recipes come from all of `tools/results/recipes*.json`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from ladder import BUDGETS, RUNGS, first_within, plan_of
from measuring import Resumable, check_alone

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble, build, specify
from asdm_compress.core.provenance import processor_name
from asdm_compress.core.recipe import bundled_recipes, load_recipe
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.loading import load_unet
from asdm_compress.models.source import LoadOptions
from asdm_compress.models.walk import start, steps_of, take
from asdm_compress.profiling.counting import count_macs
from asdm_compress.profiling.latency import ForwardPass, median_ratio, time_side_by_side
from asdm_compress.profiling.profile import ProfileSettings, forward_pass, random_inputs

RESULTS = Path(__file__).parent / "results" / "recipes.json"
MODELS = ("sd15", "sd21-base")
TOKENS = 77
# Beside other programs single passes take up to twice their time, and never less than they need.
LEAST, MEDIAN = "least time over the least of all the teacher's", "median of the turns' ratios"
BY_STEPS = "sum of every unit's least time, units in turns"


def main() -> None:
    """Time the rungs that budgets lead to, and the recipes if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of a comparison, of each UNet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="count only what this process has the core for")
    parser.add_argument("--by-steps", action="store_true", help="take turns after every unit, not after every pass")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file for another machine")
    parser.add_argument("--all", action="store_true", help="time the recipes that are there, too")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    arguments = parser.parse_args()
    if arguments.by_steps and (arguments.processor_time or arguments.device != "cpu"):
        parser.error("--by-steps is for CPUs, without --processor-time")
    if not arguments.processor_time:
        check_alone()
    settings = ProfileSettings(text_tokens=TOKENS, repeats=arguments.repeats)
    statistic = BY_STEPS if arguments.by_steps else LEAST if arguments.processor_time else MEDIAN
    bench = _Bench(settings, torch.device(arguments.device), statistic, arguments.results, arguments.again)
    for model in arguments.models:
        bench.open(model)
        guesses = [bench.macs(plan_of(rungs)) / bench.macs({}) for rungs in range(len(RUNGS) + 1)]
        found = None
        # What is measured later can change what was found before.
        while found != (again := first_within(BUDGETS, guesses, lambda rungs: bench.ratio(plan_of(rungs)))):
            found = again
        budgets = {str(budget): rungs for budget, rungs in found.items()}
        bench.kept.facts.setdefault("budgets", {})[model] = budgets
        bench.kept.write()
        print(model, budgets, flush=True)
        for name, path in bundled_recipes().items() if arguments.all else ():
            recipe = load_recipe(path)
            if recipe.base.model == model:
                bench.ratio(recipe.as_edits(), name)


class _Bench:
    """The teacher of a family beside its students, and what was measured of them."""

    def __init__(
        self, settings: ProfileSettings, device: torch.device, statistic: str, file: Path, again: bool
    ) -> None:
        self.settings, self.device, self.statistic = settings, device, statistic
        processor_time = statistic == LEAST
        if processor_time and (torch.get_num_threads() > 1 or self.device.type != "cpu"):
            raise SystemExit("--processor-time is for one CPU thread (OMP_NUM_THREADS=1): others spin while they wait")
        self.model = ""
        self.teacher: UNet2DConditionModel | None = None
        name = processor_name() if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        setting = {"device": name, "threads": torch.get_num_threads(), "dtype": "bf16", "batch": settings.batch,
                   "clock": "processor time" if processor_time else "time", "statistic": statistic}  # fmt: skip
        self.kept = Resumable(file.stem, __doc__ or "", device, file.parent, setting=setting).begin(again)

    def open(self, model: str) -> None:
        self.model = model
        self.teacher = load_unet(model, LoadOptions(torch.bfloat16, self.device, random_weights=True))

    def macs(self, edits: Mapping[str, str]) -> int:
        with torch.device("meta"):
            blank = UNet2DConditionModel(**FAMILIES[self.model].unet_config)
        spec, size = specify(blank, Plan(edits)), FAMILIES[self.model].image_size // 8
        return int(count_macs(build(spec.config, spec.edits), 1, size, size, TOKENS)[""].total)

    def ratio(self, edits: Mapping[str, str], recipe: str | None = None) -> float:
        """The student's time over the teacher's; measured once."""
        assert self.teacher is not None
        for row in self.kept.rows:
            if row["model"] == self.model and row["edits"] == dict(edits):
                if recipe and recipe not in row["recipes"]:
                    row["recipes"].append(recipe)
                    self.kept.write()
                return float(row["latency_ratio"])
        began = time.monotonic()
        student = assemble(self.teacher, Plan(edits))
        if self.statistic == BY_STEPS:
            turns = _times_of_steps((student, self.teacher), self.settings)
            ratio = turns[0][0] / turns[1][0]
        else:
            passes = [forward_pass(unet, self.settings) for unet in (student, self.teacher)]
            if self.statistic == LEAST:
                turns = _processor_times(passes, self.settings.repeats)
            else:
                turns = time_side_by_side(passes, self.settings.repeats, self.device, math.inf)
            ratio = median_ratio(*turns)
        macs, whole = self.macs(edits), self.macs({})
        row = {
            "model": self.model,
            "recipes": [recipe] if recipe else [],
            "latency_ratio": round(ratio, 4),
            "latency_seconds": [[round(seconds, 4) for seconds in turn] for turn in turns],  # student, teacher
            "macs": macs,
            "macs_ratio": round(macs / whole, 4),
            "parameters": sum(p.numel() for p in student.parameters()),
            "edits": dict(edits),
            "seconds": round(time.monotonic() - began, 1),
        }
        self.kept.add(row)
        if self.statistic == LEAST:
            self._by_least_times()
            self.kept.write()
        return float(self.kept.rows[-1]["latency_ratio"])

    def _by_least_times(self) -> None:
        """Set the ratios of the model's rows by the least of all the teacher's times so far."""
        rows = [row for row in self.kept.rows if row["model"] == self.model]
        least = min(min(row["latency_seconds"][1]) for row in rows)
        for row in rows:
            row["latency_ratio"] = round(min(row["latency_seconds"][0]) / least, 4)


def _processor_times(passes: Sequence[ForwardPass], repeats: int) -> list[list[float]]:
    """As `time_side_by_side`, in seconds of the processor, which do not pass while others have the core."""
    for forward in passes:
        forward()
    samples: list[list[float]] = [[] for _ in passes]
    for _ in range(repeats):
        for forward, seconds in zip(passes, samples, strict=True):
            began = time.process_time()
            forward()
            seconds.append(time.process_time() - began)
    return samples


@torch.no_grad()
def _times_of_steps(unets: Sequence[UNet2DConditionModel], settings: ProfileSettings) -> list[list[float]]:
    """One pass of each UNet, in seconds, as the sum of the least times of its units.

    The UNets take turns after every unit, so that a slow moment meets all of them, and only slows one unit of one turn.
    """
    steps = [steps_of(unet) for unet in unets]
    order = sorted((place / len(own), which) for which, own in enumerate(steps) for place in range(len(own)))
    least = [[math.inf] * len(own) for own in steps]
    for _ in range(settings.repeats + 1):  # the first warms up
        states = [start(unet, *random_inputs(unet, settings)) for unet in unets]
        at = [0] * len(unets)
        for _, which in order:
            began = time.perf_counter()
            states[which] = take(steps[which][at[which]], states[which])
            seconds = time.perf_counter() - began
            least[which][at[which]] = min(least[which][at[which]], seconds)
            at[which] += 1
    return [[sum(own)] for own in least]


if __name__ == "__main__":
    main()
