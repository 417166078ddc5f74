"""A UNet's forward pass as a list of steps, so that a run can stop, be kept, and go on at any unit.

The steps call the model's own modules in the order of diffusers' `UNet2DConditionModel.forward`; the result is
bit-identical to it (tested). ControlNet and adapter residuals have no place here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.models.sites import modules_of

StepKind = Literal["stem", "resnet", "decoder-resnet", "transformer", "downsampler", "upsampler", "head"]


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the rest of a forward pass needs.

    `hidden` is (B, C, H, W); `skips` the encoder's outputs not yet consumed, the newest last.
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    time_embedding: Tensor
    text: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of a forward pass: its site's path, what it does, its modules, and whether its output is a skip."""

    path: str
    kind: StepKind
    modules: tuple[nn.Module, ...]
    pushes_skip: bool = False


def steps_of(unet: UNet2DConditionModel) -> tuple[Step, ...]:
    """The steps after the time embedding, from `conv_in` to `conv_out`."""
    steps = [Step("conv_in", "stem", (unet.conv_in,), pushes_skip=True)]
    for i, block in enumerate(unet.down_blocks):
        steps += _block_steps(f"down_blocks.{i}", block, "resnet", pushes_skips=True)
    if unet.mid_block is not None:
        steps += _mid_steps(unet.mid_block)
    for i, block in enumerate(unet.up_blocks):
        steps += _block_steps(f"up_blocks.{i}", block, "decoder-resnet", pushes_skips=False)
    head = tuple(m for m in (unet.conv_norm_out, unet.conv_act, unet.conv_out) if m is not None)
    return (*steps, Step("conv_out", "head", head))


def _block_steps(path: str, block: nn.Module, resnet_kind: StepKind, pushes_skips: bool) -> list[Step]:
    steps: list[Step] = []
    attentions = modules_of(block, "attentions")
    for j, resnet in enumerate(modules_of(block, "resnets")):
        lone = j >= len(attentions)
        steps.append(Step(f"{path}.resnets.{j}", resnet_kind, (resnet,), pushes_skips and lone))
        if not lone:
            steps.append(Step(f"{path}.attentions.{j}", "transformer", (attentions[j],), pushes_skips))
    for j, sampler in enumerate(modules_of(block, "downsamplers")):
        steps.append(Step(f"{path}.downsamplers.{j}", "downsampler", (sampler,), pushes_skips))
    for j, sampler in enumerate(modules_of(block, "upsamplers")):
        steps.append(Step(f"{path}.upsamplers.{j}", "upsampler", (sampler,)))
    return steps


def _mid_steps(mid: nn.Module) -> list[Step]:
    resnets, attentions = modules_of(mid, "resnets"), modules_of(mid, "attentions")
    steps = [Step("mid_block.resnets.0", "resnet", (resnets[0],))]
    for j, resnet in enumerate(resnets[1:]):
        if j < len(attentions) and attentions[j] is not None:
            steps.append(Step(f"mid_block.attentions.{j}", "transformer", (attentions[j],)))
        steps.append(Step(f"mid_block.resnets.{j + 1}", "resnet", (resnet,)))
    return steps


def start(unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor, text: Tensor) -> State:
    """The state before `conv_in`: `sample` (B, C, H, W), `timestep` a scalar or (B,), `text` (B, tokens, width)."""
    embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), None)
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    return State(sample, (), embedding, text)


def take(step: Step, state: State) -> State:
    """The state after one step."""
    hidden, skips = state.hidden, state.skips
    module = step.modules[0]
    if step.kind == "transformer":
        hidden = module(hidden, encoder_hidden_states=state.text, return_dict=False)[0]
    elif step.kind == "resnet":
        hidden = module(hidden, state.time_embedding)
    elif step.kind == "decoder-resnet":
        hidden = module(torch.cat([hidden, skips[-1]], dim=1), state.time_embedding)
        skips = skips[:-1]
    elif step.kind == "upsampler":
        # The size of the next skip is twice this one's wherever doubling is what the stock forward does.
        hidden = module(hidden, skips[-1].shape[2:])
    else:
        for part in step.modules:
            hidden = part(hidden)
    if step.pushes_skip:
        skips = (*skips, hidden)
    return replace(state, hidden=hidden, skips=skips)


def finish(steps: Sequence[Step], state: State) -> Tensor:
    """Take all the steps; the noise prediction (B, C, H, W)."""
    for step in steps:
        state = take(step, state)
    return state.hidden


def shared_prefix(first: Sequence[Step], second: Sequence[Step]) -> int:
    """The number of leading steps that run the very same modules in both lists."""
    count = 0
    for a, b in zip(first, second, strict=False):
        same = len(a.modules) == len(b.modules) and all(x is y for x, y in zip(a.modules, b.modules, strict=True))
        if not same or (a.kind, a.pushes_skip) != (b.kind, b.pushes_skip):
            break
        count += 1
    return count
