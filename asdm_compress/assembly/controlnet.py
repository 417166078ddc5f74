"""ControlNets for students: one made from a student's own encoder, and a teacher's that a student is to use."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from asdm_compress.assembly.plan import Plan, place
from asdm_compress.assembly.stock import keep_levels
from asdm_compress.assembly.stock_check import stock_parts
from asdm_compress.assembly.surgery import build
from asdm_compress.core.edits import DROP, EXACT
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.assembled_controlnet import AssembledControlNetModel
from asdm_compress.models.sites import modules_of
from asdm_compress.models.walk import steps_of

ENCODER = ("down_blocks.", "mid_block.")


@dataclass(frozen=True, slots=True)
class RemappedControlNet:
    """A ControlNet whose residuals fit a student, and the teacher's places whose residuals have no taker there."""

    controlnet: ControlNetModel
    left_out: tuple[str, ...]


def controlnet_from(student: UNet2DConditionModel, **options: Any) -> ControlNetModel:
    """A ControlNet to be trained, with a copy of a student's encoder and zero convolutions behind it.

    As diffusers' `ControlNetModel.from_unet`, which knows neither UNets without mid block, nor levels of different
    depths, nor slots; where it does, its result is returned. `options` are its further parameters, such as
    `conditioning_embedding_out_channels`.
    """
    edits = {site: edit for site, edit in (student.config.get("edits") or {}).items() if site.startswith(ENCODER)}
    if all(edit in EXACT for edit in edits.values()):
        edits = {}  # a class of its own is not worth it
    depths = student.config["layers_per_block"]
    if not edits and isinstance(depths, int) and student.mid_block is not None:
        return ControlNetModel.from_unet(student, **options)
    names = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: student.config[name] for name in names if name in student.config}
    controlnet = AssembledControlNetModel(**config, edits=edits, **options)
    weights = student.state_dict()
    shared = {key: weights[key] for key in controlnet.state_dict() if key in weights}
    controlnet.load_state_dict(shared, strict=False)
    return controlnet


def remap_controlnet(controlnet: ControlNetModel, teacher: UNet2DConditionModel, plan: Plan) -> RemappedControlNet:
    """The ControlNet of a teacher for the student of a plan: every residual goes where the teacher's decoder takes it.

    A stock UNet takes residuals by their number, and a student's skip connections have other numbers. Residuals of skip
    connections that no decoder layer of the student takes in are not given, and levels that the student does not have
    are not run. Weights are shared. Raises AsdmError for a ControlNet that does not fit the teacher.
    """
    _check_fit(controlnet, teacher)
    placed = place(teacher, plan)
    parts = stock_parts(teacher, placed)
    student = build(parts.config, parts.edits)
    consumers = _consumers(teacher)
    taken = [consumers.index(parts.teacher_key(path)) for path in _consumers(student)]
    config = {name: value for name, value in controlnet.config.items() if not name.startswith("_")}
    cut = placed.keep_levels is not None
    keep_levels(config, len(teacher.down_blocks), placed.keep_levels or len(teacher.down_blocks))
    used = [i for i, path in zip(taken, _consumers(student), strict=True) if parts.edits.get(path) != DROP]
    left_out = [path for i, path in enumerate(_skip_sources(teacher)) if i not in used]
    if cut:
        config["mid_block_type"] = None
        left_out.append("mid_block")
    if taken == list(range(len(consumers))):
        return RemappedControlNet(controlnet, tuple(left_out))
    with torch.device("meta"):
        remapped = AssembledControlNetModel(**config, skips=taken)
    weights = controlnet.state_dict()
    if cut:  # what the mid block of the teacher would get, nothing gets: zero, in the shape of the decoder's input
        middle = remapped.controlnet_mid_block.state_dict(prefix="controlnet_mid_block.")
        weights |= {
            key: torch.zeros_like(old, device=controlnet.device, dtype=controlnet.dtype) for key, old in middle.items()
        }
    remapped.load_state_dict({key: weights[key] for key in remapped.state_dict()}, assign=True)
    remapped.train(controlnet.training).requires_grad_(False)
    return RemappedControlNet(remapped, tuple(left_out))


def _consumers(unet: UNet2DConditionModel) -> list[str]:
    """The decoder's ResNet that takes each skip connection in, in the encoder's order: the last pushed goes first."""
    paths = [f"up_blocks.{i}.resnets.{j}" for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]
    return paths[::-1]


def _skip_sources(unet: UNet2DConditionModel) -> list[str]:
    return [step.path for step in steps_of(unet) if step.pushes_skip]


def _check_fit(controlnet: ControlNetModel, teacher: UNet2DConditionModel) -> None:
    given = [conv.out_channels for conv in controlnet.controlnet_down_blocks]
    skips = [teacher.conv_in.out_channels]
    for block in teacher.down_blocks:
        skips += [part.out_channels for name in ("resnets", "downsamplers") for part in modules_of(block, name)]
    hint = "Give one that was made for the teacher; for a student make one with `controlnet_from`."
    if isinstance(controlnet, AssembledControlNetModel):
        raise AsdmError("this ControlNet was made for a student", hint)
    if given != skips:
        raise AsdmError(
            f"this ControlNet's {len(given)} residuals do not fit the teacher's {len(skips)} skip connections",
            hint,
        )
