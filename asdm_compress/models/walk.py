"""A UNet's forward pass as a list of steps, so that a run can stop, be kept, and go on at any unit.

The steps call the model's own modules in the order of diffusers' `UNet2DConditionModel.forward`; the result is
bit-identical to it (tested). Where a slot is routed by the timestep, its step hands the moment to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from asdm_compress.models.expert_conv import Moment
from asdm_compress.models.residuals import NONE_ADDED, AddedResiduals
from asdm_compress.models.sites import modules_of
from asdm_compress.models.slots import takes_moment

Checkpoint = Callable[..., Tensor]
StepKind = Literal["stem", "resnet", "decoder-resnet", "transformer", "downsampler", "upsampler", "head"]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What every step of one forward pass may look at: the time embedding (B, D), the text (B, tokens, width), the
    moment, and further keyword arguments for the transformers (masks, attention settings)."""

    time_embedding: Tensor
    text: Tensor
    moment: Moment
    attention: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the rest of a forward pass needs.

    `hidden` is (B, C, H, W); `skips` the encoder's outputs not yet consumed, the newest last.
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    conditioning: Conditioning


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of a forward pass: its site's path, what it does, its modules, and whether its output is a skip.

    `block` is the decoder block that may carry FreeU's factors; `encoder_block` the number of the encoder block whose
    layers end here.
    """

    path: str
    kind: StepKind
    modules: tuple[nn.Module, ...]
    pushes_skip: bool = False
    block: nn.Module | None = None
    encoder_block: int | None = None


def steps_of(unet: UNet2DConditionModel) -> tuple[Step, ...]:
    """The steps after the time embedding, from `conv_in` to `conv_out`."""
    steps = [Step("conv_in", "stem", (unet.conv_in,), pushes_skip=True)]
    for i, block in enumerate(unet.down_blocks):
        inside = _block_steps(f"down_blocks.{i}", block, "resnet", pushes_skips=True)
        # An adapter's residual is added before the downsampler, but behind it in a block without attention.
        last = len(inside) - 1 - (len(modules_of(block, "downsamplers")) if modules_of(block, "attentions") else 0)
        inside[last] = replace(inside[last], encoder_block=i)
        steps += inside
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
        decoder = block if resnet_kind == "decoder-resnet" else None
        steps.append(Step(f"{path}.resnets.{j}", resnet_kind, (resnet,), pushes_skips and lone, decoder))
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


def start(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor | float,
    text: Tensor,
    timestep_condition: Tensor | None = None,
    attention: Mapping[str, Any] | None = None,
    moment: Moment | None = None,
) -> State:
    """The state before `conv_in`: `sample` (B, C, H, W), `timestep` a scalar or (B,), `text` (B, tokens, width).

    Who knows the moment gives it; otherwise it is read from the timestep, which on a GPU waits for it.
    """
    embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_condition)
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    moment = moment or Moment.of(timestep, sample.shape[0], sample.device)
    return State(sample, (), Conditioning(embedding, text, moment, attention or {}))


def take(step: Step, state: State, added: AddedResiduals = NONE_ADDED, checkpoint: Checkpoint | None = None) -> State:
    """The state after one step. `checkpoint` runs a function and forgets its activations until the backward pass."""
    given, skips, hidden = state.conditioning, state.skips, state.hidden
    if step.kind == "decoder-resnet":
        hidden, skips = joined(step, hidden, skips[-1]), skips[:-1]
    # The size of the next skip is twice this one's wherever doubling is what the stock forward does.
    size = skips[-1].shape[2:] if step.kind == "upsampler" else None
    hidden = checkpoint(run, step, hidden, given, size) if checkpoint else run(step, hidden, given, size)
    hidden = added.to_block(step.encoder_block, hidden)
    if step.pushes_skip:
        skips = (*skips, hidden)
    return replace(state, hidden=hidden, skips=skips)


def joined(step: Step, hidden: Tensor, skip: Tensor) -> Tensor:
    """What a decoder ResNet takes: hidden state and skip connection, under FreeU (2309.11497) where that is on.

    diffusers scales the hidden state in place. Somebody may have kept it, so that a copy is scaled here; where the
    hidden state is the skip connection too (behind a dropped mid block), diffusers scales that with it, and so does
    this.
    """
    factors = {name: getattr(step.block, name, None) for name in ("s1", "s2", "b1", "b2")}
    if step.block is not None and all(factors.values()):
        scaled = hidden.clone()
        skip = scaled if skip is hidden else skip
        hidden, skip = apply_freeu(step.block.resolution_idx, scaled, skip, **factors)
    return torch.cat((hidden, skip), dim=1)


def run(step: Step, hidden: Tensor, given: Conditioning, size: Sequence[int] | None = None) -> Tensor:
    """The output of a step's modules; `hidden` has the skip connection in it already, `size` is an upsampler's."""
    module = step.modules[0]
    extra = {"moment": given.moment} if takes_moment(module) else {}
    if step.kind == "transformer":
        return module(hidden, encoder_hidden_states=given.text, return_dict=False, **given.attention, **extra)[0]  # type: ignore[no-any-return]
    if step.kind in ("resnet", "decoder-resnet"):
        return module(hidden, given.time_embedding, **extra)  # type: ignore[no-any-return]
    if step.kind == "upsampler":
        return module(hidden, size, **extra)  # type: ignore[no-any-return]
    for part in step.modules:
        hidden = part(hidden, **extra)
    return hidden


def finish(
    steps: Sequence[Step], state: State, added: AddedResiduals = NONE_ADDED, checkpoint: Checkpoint | None = None
) -> Tensor:
    """Take all the steps; the noise prediction (B, C, H, W)."""
    where = "encoder"
    for step in steps:
        if where == "encoder" and step.path.startswith(("mid_block", "up_blocks")):
            where, state = "middle", replace(state, skips=added.to_skips(state.skips))
        if where == "middle" and step.path.startswith("up_blocks"):
            where, state = "decoder", replace(state, hidden=added.to_mid(state.hidden))
        state = take(step, state, added, checkpoint)
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
