"""Ways to run the UNet: compiled, exported, in other layouts and precisions."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from matrix.outcome import Check, Outcome, largest, share
from matrix.subjects import Subject, predict


def compiled(subject: Subject, backend: str = "inductor") -> Outcome:
    """Oracle: not compiled."""
    torch._dynamo.reset()
    unet = torch.compile(subject.fresh(), fullgraph=True, backend=backend)
    return Outcome(largest(predict(unet, subject.inputs), predict(subject.unet, subject.inputs)), note=backend)


def exported(subject: Subject) -> Outcome:
    """Oracle: not exported; at another timestep than the one exported with."""
    sample, timestep, text = subject.inputs
    with torch.no_grad():
        program = torch.export.export(subject.fresh(), (sample, timestep, text), {"return_dict": False})
    elsewhere = (sample, torch.tensor(20), text)
    found = predict(program.module(), elsewhere)
    return Outcome(largest(found, predict(subject.unet, elsewhere)))


def channels_last(subject: Subject) -> Outcome:
    """Oracle: the usual layout."""
    sample, timestep, text = subject.inputs
    unet = subject.fresh().to(memory_format=torch.channels_last)
    found = predict(unet, (sample.contiguous(memory_format=torch.channels_last), timestep, text))
    return Outcome(largest(found, predict(subject.unet, subject.inputs)))


def in_precision(subject: Subject, dtype: torch.dtype) -> Outcome:
    """Oracle: fp32."""
    sample, timestep, text = subject.inputs
    found = predict(subject.fresh().to(dtype), (sample.to(dtype), timestep, text.to(dtype)))
    return Outcome(share(found, predict(subject.unet, subject.inputs)), relative=True)


def int8(subject: Subject) -> Outcome:
    """torchao's int8 weights for all linear layers. Oracle: fp32."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    unet = subject.fresh()
    quantize_(unet, Int8WeightOnlyConfig())
    linear = [module for module in unet.modules() if isinstance(module, nn.Linear)]
    # Of a layer that is left as it is, the weight is a plain parameter.
    assert linear and all(type(module.weight) is not nn.Parameter for module in linear), "not all layers are in int8"
    found, expected = predict(unet, subject.inputs), predict(subject.unet, subject.inputs)
    return Outcome(share(found, expected), relative=True)


CHECKS = (
    Check("`torch.compile`, one graph", compiled),
    Check("`torch.export`", exported),
    Check("channels-last", channels_last),
    Check("fp16 on the CPU", partial(in_precision, dtype=torch.float16), 0.01),
    Check("bf16", partial(in_precision, dtype=torch.bfloat16), 0.05),
    Check("torchao int8 weights", int8, 0.05),
)
