"""Surgery: a student as a pure function of teacher and plan, every weight inherited by an explicit map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import Plan, place
from asdm_compress.assembly.stock_check import stock_parts
from asdm_compress.core.edits import Edit
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.edits import SlotWeights, edited_copy, own_tensors, weights_path
from asdm_compress.models.tree import meta_copy


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """What a student is made of, without its weights.

    `config` is a plain diffusers config. `edits`, in the student's own numbering, are those that no such config can
    express; without any, the student is a stock UNet. `weight_map` gives every student tensor that is inherited its
    teacher tensor; `slot_map` every other one the unit or sub-unit whose edit brings it along, and its name in
    the convolution or the narrowed module.
    """

    config: Mapping[str, Any]
    edits: Mapping[str, Edit]
    weight_map: Mapping[str, str]
    slot_map: Mapping[str, tuple[str, str]]

    @property
    def is_stock(self) -> bool:
        """Whether plain diffusers can open the student."""
        return not self.edits


def specify(unet: UNet2DConditionModel, plan: Plan) -> StudentSpec:
    """Work out the student of a plan: as much as possible in the config, the rest as edits.

    Raises AsdmError for a plan that does not fit the UNet (see `place`).
    """
    placed = place(unet, plan)
    parts = stock_parts(unet, placed)
    student = build(parts.config, parts.edits)
    names = {key: parts.teacher_key(key) for key in student.state_dict()}
    bearing = edited_copy(meta_copy(unet), placed.units)
    brought = {
        f"{weights_path(bearing, path)}.{name}": (path, name)
        for path, edit in placed.units.items()
        for name in own_tensors(bearing, path, edit)
    }
    slot_map = {key: brought[name] for key, name in names.items() if name in brought}
    weight_map = {key: name for key, name in names.items() if key not in slot_map}
    _check_map(unet, student, weight_map)
    return StudentSpec(parts.config, parts.edits, weight_map, slot_map)


def assemble(unet: UNet2DConditionModel, plan: Plan, slot_weights: SlotWeights | None = None) -> UNet2DConditionModel:
    """Build the student of a plan with copies of the teacher's weights; the teacher is not touched.

    `slot_weights` are what the plan's edits bring along and what was refitted, by path (see `assembly.plan_fit`);
    without them convolutions are zero and narrowed modules keep their largest structures. The same teacher, plan and
    slot weights always give the same student; an empty plan gives a bit-identical UNet. Raises AsdmError for a plan
    that does not fit the UNet.
    """
    spec = specify(unet, plan)
    student = build(spec.config, spec.edits)
    given = slot_weights or {}
    weights = unet.state_dict()
    refitted = {f"{path}.{name}" if path else name: t for path, part in given.items() for name, t in part.items()}
    state = {
        key: refitted.get(source, weights[source]).detach().to(weights[source], copy=True)
        for key, source in spec.weight_map.items()
    }
    if spec.slot_map:
        zero = edited_copy(unet, place(unet, plan).units)
        for key, (unit, name) in spec.slot_map.items():
            # A narrowed feed-forward may have been solved anew with its transformer, under whose path that is then.
            source = refitted.get(f"{unit}.{name}")
            if source is None:
                source = zero.get_submodule(weights_path(zero, unit)).state_dict()[name]
            state[key] = source.detach().to(unet.device, unet.dtype, copy=True)
    student.load_state_dict(state, strict=True, assign=True)
    return student.eval().requires_grad_(False)


def build(config: Mapping[str, Any], edits: Mapping[str, Edit]) -> UNet2DConditionModel:
    """A student without weights, on the meta device."""
    with torch.device("meta"):
        if edits:
            return AssembledUNet2DConditionModel(**config, edits=dict(edits))
        return UNet2DConditionModel(**config)


def _check_map(unet: UNet2DConditionModel, student: UNet2DConditionModel, weight_map: Mapping[str, str]) -> None:
    teacher, tensors = unet.state_dict(), student.state_dict()
    for key, source in weight_map.items():
        tensor = tensors[key]
        if source not in teacher:
            raise AsdmError(f"the student's {key} would come from {source}, which the teacher does not have")
        if teacher[source].shape != tensor.shape:
            raise AsdmError(
                f"the student's {key} has the shape {tuple(tensor.shape)}, the teacher's {source} "
                f"{tuple(teacher[source].shape)}"
            )
    if len(set(weight_map.values())) != len(weight_map):
        raise AsdmError("two tensors of the student would come from one of the teacher")


def removed_tensors(unet: UNet2DConditionModel, spec: StudentSpec) -> tuple[str, ...]:
    """The teacher's tensors that the student does not inherit, in the teacher's order."""
    kept = set(spec.weight_map.values())
    return tuple(key for key in unet.state_dict() if key not in kept)
