"""How a student is to be trained: the section of a new student's recipe, and what a training makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType

from asdm_compress.assembly.plan import Plan
from asdm_compress.core.distillation import (
    DEFAULT_PRESET,
    MINI_PRESET,
    Distillation,
    Expected,
    Pair,
    changed,
    load_preset,
    rate_for,
)
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Recipe
from asdm_compress.distillation.estimate import encoder_bytes, estimate_memory, rows_kept
from asdm_compress.distillation.pairs import find_pairs
from asdm_compress.evaluation.prompts import understands_scenes
from asdm_compress.models.families import latent_size_of
from asdm_compress.profiling.counting import count_macs


def training_section(
    pipeline: StableDiffusionPipeline, student: UNet2DConditionModel, plan: Plan, damage: float | None = None
) -> Distillation:
    """The preset for the pipeline's model, with the feature pairs of this plan and a learning rate for its damage.

    The expected cost is that of training everything in fp32 with the whole batch at once: bytes, and the MACs of all
    steps, a backward pass counted as two forward ones.
    """
    teacher = pipeline.unet
    training = load_preset(MINI_PRESET if understands_scenes(pipeline) else DEFAULT_PRESET)
    training = _at_rate_for(training, damage)
    pairs = find_pairs(student, teacher, plan, training.losses.features)
    tokens, size = int(pipeline.tokenizer.model_max_length), latent_size_of(teacher)
    parameters = sum(p.numel() for p in student.parameters())
    memory = estimate_memory(student, teacher, parameters, rows_kept(training.batch, training.losses), tokens)
    memory = replace(memory, encoders=encoder_bytes(pipeline))
    ours, theirs = (count_macs(unet, 1, size, size, tokens)[""].total for unet in (student, teacher))
    expected = Expected(
        memory_bytes=memory.total,
        macs=training.steps * training.batch * (3 * ours + theirs),
        trained_parameters=parameters,
    )
    told = [Pair(student=pair.student, teacher=pair.teacher) for pair in pairs]
    return training.model_copy(update={"pairs": told, "expected": expected})


def choose_training(
    recipe: Recipe, teacher: StableDiffusionPipeline, preset: str | None, changes: Mapping[str, Any]
) -> Distillation:
    """The preset that is asked for, or the recipe's own section, or the model's preset; with a user's changes.

    Pairs of features that the recipe names hold for its own losses; others are derived from the plan. Raises AsdmError
    for a preset that is none and for values that cannot be.
    """
    if preset is not None:
        base = load_preset(preset)
    elif recipe.distillation is not None:
        pairs = recipe.distillation.pairs if changes.get("losses.features") is None else None
        # Captions to probe on are a file of whoever trained before, perhaps on another machine.
        base = recipe.distillation.model_copy(update={"expected": None, "pairs": pairs, "probe_captions": None})
    else:
        base = load_preset(MINI_PRESET if understands_scenes(teacher) else DEFAULT_PRESET)
        base = _at_rate_for(base, damage_before(recipe))
    training = changed(base, dict(changes))
    names = [str(kind.value) for kind in SchedulerType if kind.value != "piecewise_constant"]
    if training.optimiser.schedule not in names:
        raise AsdmError(f"unknown schedule {training.optimiser.schedule!r}", f"Known: {', '.join(names)}.")
    return training


def damage_before(recipe: Recipe) -> float | None:
    """The damage that `assemble` measured on its student on held-out prompts; None of a recipe that nobody measured."""
    return None if recipe.evidence is None else recipe.evidence.held_out_damage


def _at_rate_for(training: Distillation, damage: float | None) -> Distillation:
    if damage is None:
        return training
    return changed(training, {"optimiser.learning_rate": rate_for(training.optimiser.learning_rate, damage)})
