"""Runs programs: one pass through a UNet, in which some features are given and some are handed back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.inheritance.corrections import Correction, corrected, regressors
from asdm_compress.inheritance.graph import PREDICTION, SAMPLE, Op
from asdm_compress.inheritance.places import Feature, around
from asdm_compress.inheritance.program import Program
from asdm_compress.models.call import UNetCall
from asdm_compress.models.expert_conv import Moment
from asdm_compress.models.residuals import AddedResiduals
from asdm_compress.models.slots import takes_moment
from asdm_compress.models.walk import Conditioning, joined, run


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a correction needs beside the forecast: the source's forecast and last value, the feature's last value."""

    source_forecast: Tensor
    source_last: Tensor
    last: Tensor
    correction: Correction


@dataclass(frozen=True, slots=True)
class Given:
    """The tensors that a pass takes: one per feature of `program.taken`, and what their corrections need."""

    values: Sequence[Tensor] = ()
    corrected: Mapping[Feature, Corrected] = field(default_factory=dict)


NOTHING_GIVEN = Given()


def run_program(
    unet: UNet2DConditionModel,
    program: Program,
    call: UNetCall,
    given: Given = NOTHING_GIVEN,
    moment: Moment | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The prediction (B, C, H, W), and the tensors of `program.recorded`.

    Where the program is the whole pass the prediction is bit-identical to the UNet's own. Nothing here reads a value
    from the device, except for a UNet with slots that are routed by the timestep when `moment` is not given, and for
    modules that look whether both guidance branches are the same yet (see `models.shared`).
    """
    values: dict[str, Tensor] = {}
    taken = {f.value: (f, tensor) for f, tensor in zip(program.taken, given.values, strict=True)}
    conditioning, added = None, call.added()
    if program.computes:
        state = call.begin(unet, moment)
        conditioning, values[SAMPLE] = state.conditioning, state.hidden
    for op, dying in zip(program.ops, program.dying, strict=True):
        inputs = [values[value] for value in op.inputs]
        if op.kind in ("taken", "restored"):
            feature, tensor = taken[op.value]
            values[op.value] = _stand_in(op, inputs, tensor, given.corrected.get(feature))
        else:
            values[op.value] = _compute(op, inputs, conditioning, added)
        for value in dying:
            values.pop(value, None)
    return values[PREDICTION], tuple(values[feature.name] for feature in program.recorded)


def _stand_in(op: Op, inputs: list[Tensor], forecast: Tensor, more: Corrected | None) -> Tensor:
    """A taken value, or the shortcut plus a taken branch; corrected where that is fitted."""
    if op.correction is not None:
        source = inputs.pop()
        if more is not None:
            seen = regressors(source, more.source_forecast, more.source_last, more.last)
            correction = more.correction.on(forecast)
            forecast = corrected(forecast, seen, correction.weight, correction.bias)
    if op.kind == "taken":
        return forecast
    return _outside(op, inputs) + forecast


def _outside(op: Op, inputs: list[Tensor]) -> Tensor:
    module, step = op.modules[0], op.step
    assert module is not None and step is not None
    return around(module, joined(step, *inputs) if step.kind == "decoder-resnet" else inputs[0])


def _compute(op: Op, inputs: list[Tensor], given: Conditioning | None, added: AddedResiduals) -> Tensor:
    if op.kind in _JOINTS:
        return _JOINTS[op.kind](op, inputs, added)
    assert given is not None
    return _MODULES[op.kind](op, inputs, given)


def _unit(op: Op, inputs: list[Tensor], given: Conditioning) -> Tensor:
    step, hidden = op.step, inputs[0]
    assert step is not None
    size = inputs[1].shape[2:] if step.kind == "upsampler" and len(inputs) > 1 else None
    if step.kind == "decoder-resnet":
        hidden = joined(step, *inputs)
    return run(step, hidden, given, size)


def _tokens(op: Op, inputs: list[Tensor], given: Conditioning) -> Tensor:
    """(B, C, H, W) to what the transformer's blocks take, (B, H · W, width)."""
    transformer: Any = op.modules[0]
    hidden = transformer.norm(inputs[0])
    if transformer.use_linear_projection:
        return transformer.proj_in(_flat(hidden))  # type: ignore[no-any-return]
    return _flat(transformer.proj_in(hidden))


def _flat(hidden: Tensor) -> Tensor:
    return hidden.permute(0, 2, 3, 1).reshape(len(hidden), -1, hidden.shape[1])


def _projected(op: Op, inputs: list[Tensor], given: Conditioning) -> Tensor:
    """The transformer's output (B, C, H, W) from its last tokens and its input."""
    transformer: Any = op.modules[0]
    tokens, residual = inputs
    rows, _, height, width = residual.shape
    if transformer.use_linear_projection:
        tokens = transformer.proj_out(tokens)
    hidden = tokens.reshape(rows, height, width, -1).permute(0, 3, 1, 2).contiguous()
    if not transformer.use_linear_projection:
        hidden = transformer.proj_out(hidden)
    return hidden + residual


def _part(op: Op, inputs: list[Tensor], given: Conditioning) -> Tensor:
    """The residual branch of an attention or a feed-forward layer, (B, tokens, width)."""
    norm, part = op.modules
    assert isinstance(norm, nn.Module) and isinstance(part, nn.Module)
    normed = norm(inputs[0])
    settings = given.attention.get("cross_attention_kwargs") or {}
    if op.value.endswith(".attn1"):
        return part(normed, attention_mask=given.attention.get("attention_mask"), **settings)  # type: ignore[no-any-return]
    if op.value.endswith(".attn2"):
        mask = given.attention.get("encoder_attention_mask")
        return part(normed, encoder_hidden_states=given.text, attention_mask=mask, **settings)  # type: ignore[no-any-return]
    return part(normed)  # type: ignore[no-any-return]


_JOINTS: Final[Mapping[str, Callable[[Op, list[Tensor], AddedResiduals], Tensor]]] = {
    "cut": lambda op, inputs, added: inputs[0],
    "adapter": lambda op, inputs, added: added.to_block(op.index, inputs[0]),
    "skip": lambda op, inputs, added: inputs[0] if added.skips is None else inputs[0] + added.skips[op.index],
    "middle": lambda op, inputs, added: added.to_mid(inputs[0]),
    "sum": lambda op, inputs, added: inputs[0] + inputs[1],
    "branch": lambda op, inputs, added: inputs[0] - _outside(op, inputs[1:]),
}
_MODULES: Final[Mapping[str, Callable[[Op, list[Tensor], Conditioning], Tensor]]] = {
    "unit": _unit,
    "tokens": _tokens,
    "part": _part,
    "projection": _projected,
}


def needs_moment(program: Program) -> bool:
    """Whether any module of the program is routed by the timestep."""
    return any(takes_moment(module) for op in program.ops for module in op.modules if module is not None)


def plain_moment(call: UNetCall, value: float | None) -> Moment:
    """The moment of a call that nobody has to read from the device: `value` is the timestep as the run knows it."""
    device, rows = call.sample.device, len(call.sample)
    given = torch.as_tensor(call.timestep, device=device).reshape(-1)
    return Moment(given.expand(rows), uniform=len(given) == 1, value=value if len(given) == 1 else None)
