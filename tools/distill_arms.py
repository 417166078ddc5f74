"""Who takes part in `bench_distill.py`: the plans, the weights that they start with, and how each is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from rival_plans import BK_PATTERNS
from safetensors.torch import load_file, save_file

from asdm_compress.assembly.calibration import DEFAULT_BANDS, Calibration, record
from asdm_compress.assembly.damage import compare_predictions
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.store import measurement_folder, recorded
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.defaults import CALIBRATION_PROMPTS
from asdm_compress.core.distillation import MINI_PRESET, Distillation, changed, load_preset, rate_for
from asdm_compress.core.edits import conv_spec
from asdm_compress.core.recipe import Recipe, find_recipe, load_recipe
from asdm_compress.distillation.selection import SMALL_CUT
from asdm_compress.evaluation.prompts import choose_prompts
from asdm_compress.sampling.settings import SamplingSettings

PLANS = Path(__file__).parent / "results" / "assembly.json"  # what the searches of bench_assembly.py have found
BUDGETS = (0.7, 0.5)
DAMAGE_PROMPTS = 64  # on which a student's damage before training is measured


@dataclass(frozen=True)
class Arm:
    """A student's plan, its weights at the start, how it is trained, and whether the teacher makes the images.

    `damage` is the student's before training, which decides whether its experts train first.
    """

    name: str
    plan: Plan
    start: Callable[[], UNet2DConditionModel]
    training: Distillation
    damage: float | None = None
    captions_only: bool = False


class Arms:
    """The arms at each budget; fitted students are kept in `folder` by plan."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, ours: Distillation, folder: Path, rivals_rate: float | None = None
    ) -> None:
        self.pipeline, self.teacher, self.ours, self.folder = pipeline, pipeline.unet, ours, folder
        self.rivals_rate = rivals_rate

    def recovery(self, budget: float) -> Iterator[Arm]:
        """Ours, BK-SDM's pattern nearest to the budget and its recipe, LAPTOP-Diff's, and random weights."""
        ours = our_plan(budget)
        damage = self.damage(self.fitted(ours))
        yield Arm("ours", ours, lambda: self.fitted(ours), at_rate_for(self.ours, damage), damage)
        bk = "bk-sdm-base" if budget >= 0.65 else "bk-sdm-tiny"
        pattern = BK_PATTERNS[bk]
        yield Arm("bk-sdm", pattern, lambda: assemble(self.teacher, pattern), self.like("bk-sdm-v1", pattern))
        rival = searched_plan(budget, "drop-only knapsack")
        yield Arm("laptop", rival, lambda: assemble(self.teacher, rival), self.like("laptop", rival))
        at_random = changed(self.ours, {"trains": "all"})
        yield Arm("random weights", ours, lambda: _reinitialised(assemble(self.teacher, ours)), at_random)

    def parts(self, budget: float) -> Iterator[Arm]:
        """Ours with one part left out, or put in; of a small cut the order of training and the images alone."""
        ours = our_plan(budget)
        damage = self.damage(self.fitted(ours))
        training = at_rate_for(self.ours, damage)

        def start() -> UNet2DConditionModel:
            return self.fitted(ours)

        def image_free() -> Arm:
            return Arm("image-free", ours, start, training, damage, captions_only=True)

        if damage < SMALL_CUT:
            yield Arm("all from the start", ours, start, changed(training, {"trains": "all"}))
            yield Arm("experts alone", ours, start, changed(training, {"trains": "experts"}))
            yield image_free()
            return
        yield Arm("experts first", ours, start, training, damage=0.0)
        single, bare = (Plan({s: make(e) for s, e in ours.edits.items()}) for make in (_one_kernel, _nothing))
        yield Arm("one kernel for all timesteps", single, lambda: self.fitted(single), training)
        yield Arm("nothing in the slots", bare, lambda: self.fitted(bare), training)
        # That far from its teacher it is trained at the preset's own rate.
        yield Arm("no closed-form start", ours, lambda: assemble(self.teacher, ours), self.ours)
        left_out: dict[str, dict[str, Any]] = {
            "features not normalised": {"losses.normalise": False},
            "no features": {"losses.feature": 0},
            "no timestep weights": {"losses.weighting": "none"},
            "min-SNR": {"losses.weighting": "min-snr"},
            "task loss too": {"losses.task": 1},
            "one caption in ten left out": {"losses.caption_dropout": 0.1},
            "trajectory loss too": {"losses.trajectory": 0.1},
        }
        for name, changes in left_out.items():
            yield Arm(name, ours, start, changed(training, changes))
        yield image_free()
        swapped = changed(training, {"losses.random_conditioning": 5.0})
        yield Arm("image-free, random conditioning", ours, start, swapped, captions_only=True)

    def like(self, preset: str, plan: Plan) -> Distillation:
        """Another's losses with the steps, data and optimiser that everybody has, and the rate by the same rule."""
        losses = load_preset(preset).losses
        theirs = self.ours.model_copy(update={"losses": losses, "preset": preset, "trains": "all"})
        trained = at_rate_for(theirs, self.damage(assemble(self.teacher, plan)))
        return trained if self.rivals_rate is None else changed(trained, {"optimiser.learning_rate": self.rivals_rate})

    def fitted(self, plan: Plan) -> UNet2DConditionModel:
        """The student of a plan with everything fitted in closed form, as `assemble` makes it."""
        student = assemble(self.teacher, plan)
        text = json.dumps(dict(plan.edits), sort_keys=True)
        path = self.folder / f"student-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        if not path.is_file():
            weights = fit_plan(self.teacher, plan, self._calibration, refit="full")
            student = assemble(self.teacher, plan, weights)
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.contiguous() for name, t in student.state_dict().items()}, path)
        student.load_state_dict(load_file(path))
        return student

    def damage(self, student: UNet2DConditionModel) -> float:
        """What a student lacks before any training, on prompts that nothing was fitted to."""
        found: float = compare_predictions(self.teacher, student, self._unseen).total
        return found

    @cached_property
    def _calibration(self) -> Calibration:
        return self._recorded(choose_prompts(self.pipeline, None, CALIBRATION_PROMPTS, 1).calibration)

    @cached_property
    def _unseen(self) -> Calibration:
        return self._recorded(choose_prompts(self.pipeline, None, 1, DAMAGE_PROMPTS).held_out)

    def _recorded(self, prompts: Sequence[str]) -> Calibration:
        sampling = SamplingSettings()
        folder = measurement_folder(self.pipeline, prompts, sampling, DEFAULT_BANDS)  # as `assemble` keeps them
        return recorded(folder / "triples.pt", lambda: record(self.pipeline, prompts, sampling))


def mini_training(steps: int, batch: int, items: int) -> Distillation:
    """The bundled model's preset for so many steps, images a step, and images in all; one step in twenty warms up."""
    preset = load_preset(MINI_PRESET)
    warmup = min(preset.optimiser.warmup_steps, steps // 20)
    return changed(preset, {"steps": steps, "batch": batch, "data.size": items, "optimiser.warmup_steps": warmup})


def at_rate_for(training: Distillation, damage: float) -> Distillation:
    """With the learning rate for the damage that a student has before it is trained."""
    return changed(training, {"optimiser.learning_rate": rate_for(training.optimiser.learning_rate, damage)})


def our_plan(budget: float) -> Plan:
    """What our search found for a budget: the bundled recipe where there is one."""
    recipe = _bundled(budget)
    return searched_plan(budget, "ours") if recipe is None else Plan(recipe.as_edits())


def _bundled(budget: float) -> Recipe | None:
    return load_recipe(find_recipe("mini-sd-latency-0.7x")) if budget == 0.7 else None


def searched_plan(budget: float, maker: str) -> Plan:
    """A plan of `bench_assembly.py`, whose student's measured latency kept the budget."""
    return Plan(_row(budget, maker)["edits"])


def _row(budget: float, maker: str) -> dict[str, Any]:
    rows = json.loads(PLANS.read_text(encoding="utf-8"))["rows"]
    found: dict[str, Any] = next(row for row in rows if (row["budget"], row["maker"]) == (budget, maker))
    return found


def _one_kernel(edit: str) -> str:
    return edit.split("*", maxsplit=1)[0] if conv_spec(edit) is not None else edit


def _nothing(edit: str) -> str:
    return "drop" if conv_spec(edit) is not None else edit


def _reinitialised(student: UNet2DConditionModel) -> UNet2DConditionModel:
    """Random weights; those of slots stay at zero, as they start."""
    torch.manual_seed(0)
    for module in student.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return student
