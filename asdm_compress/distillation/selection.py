"""What trains: everything, the slots' experts, what stands around the cuts, or LoRA; and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from asdm_compress.assembly.plan import Plan, place
from asdm_compress.assembly.stock import fold_into_config
from asdm_compress.core.distillation import Distillation, Trains
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.distillation.pairs import computing_steps
from asdm_compress.models.expert_conv import MultiExpertConv2d
from asdm_compress.models.walk import steps_of

SMALL_CUT: Final = 0.01  # of damage before training: after a larger one everything has to move from the start
_LORA_MODULES: Final = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps from `first` to before `last`, and what trains in them."""

    trains: Trains
    first: int
    last: int


def phases_of(settings: Distillation, student: nn.Module, damage: float | None) -> tuple[Phase, ...]:
    """The order of a training: after a small cut with slots its experts first, then all; else one phase.

    A cut is small by the `damage` that was measured on the student before training (‖ε_S − ε_T‖² / ‖ε_T‖²), not by what
    it took out: a few edits in the wrong places do more than many in the right ones. None is a damage that nobody has
    measured, and no small one. Raises AsdmError where what is to train is not there.
    """
    slots = any(isinstance(module, MultiExpertConv2d) for module in student.modules())
    if settings.trains == "experts" and not slots:
        raise AsdmError("this student has no slots, so no experts to train", "Use --trains around-cuts or all.")
    if settings.trains != "auto":
        return (Phase(settings.trains, 0, settings.steps),)
    small = damage is not None and damage < SMALL_CUT
    first = round(settings.steps * settings.experts_share) if slots and small else 0
    everything = Phase("all", first, settings.steps)
    return (Phase("experts", 0, first), everything) if first else (everything,)


def choose_parameters(
    student: UNet2DConditionModel, trains: Trains, around: Sequence[str]
) -> list[tuple[str, nn.Parameter]]:
    """Set `requires_grad` on just the parameters that train, and give them by name; `around` are units' paths."""
    names = {name for name, _ in student.named_parameters()}
    if trains == "experts":
        slots = [path for path, module in student.named_modules() if isinstance(module, MultiExpertConv2d)]
        names = {name for name in names if _inside(name, slots)}
    elif trains == "around-cuts":
        names = {name for name in names if _inside(name, around)}
    elif trains == "lora":
        names = {name for name in names if ".lora_" in name}
    chosen = []
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            chosen.append((name, parameter))
    if not chosen:
        raise AsdmError(f"nothing of this student trains with {trains}", "Use --trains all.")
    return chosen


def units_around_cuts(student: UNet2DConditionModel, teacher: UNet2DConditionModel, plan: Plan) -> tuple[str, ...]:
    """The student's units that the plan has changed, and those that run just before and after what it took out."""
    placed = place(teacher, plan)
    name = fold_into_config(teacher, placed).teacher_key
    ours = {name(step.path): step.path for step in computing_steps(student)}
    order = [step.path for step in steps_of(teacher)]
    changed = set(_changed_units(order, list(placed.units)))
    chosen: set[str] = set()
    for number, path in enumerate(order):
        if path in ours and path not in changed:
            continue
        neighbours = [path, _nearest(order[:number][::-1], ours), _nearest(order[number + 1 :], ours)]
        chosen |= {ours[n] for n in neighbours if n in ours}
    return tuple(step.path for step in computing_steps(student) if step.path in chosen)


def add_lora(student: UNet2DConditionModel, rank: int, seed: int) -> None:
    """Put LoRA (2106.09685) on the attentions' projections, the same for the same seed.

    Raises AsdmError, exit code 4, without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise AsdmError(
            "LoRA needs the package peft", "Install it with `pip install asdm-compress[distill]`.", ExitCode.ENVIRONMENT
        ) from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_LORA_MODULES)))


def fold_lora(student: UNet2DConditionModel) -> None:
    """Add the trained LoRA to the weights that it stands beside, and take it off."""
    student.fuse_lora()
    student.unload_lora()


def _inside(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _changed_units(order: Sequence[str], edited: Sequence[str]) -> Iterator[str]:
    """The units with an edit in their place or inside them."""
    for path in order:
        if any(edit == path or edit.startswith(f"{path}.") for edit in edited):
            yield path


def _nearest(paths: Sequence[str], ours: dict[str, str]) -> str:
    return next((path for path in paths if path in ours), "")
