"""A UNet as an ONNX file, which ONNX Runtime must compute as torch does before anybody gets it.

The names of inputs and output are those of Optimum's and diffusers' ONNX pipelines. Batch, height, width and the number
of text tokens are free; the timestep is one for all images, as samplers have it, so that experts routed by it cost
one plain convolution there too:

    import numpy, onnxruntime

    session = onnxruntime.InferenceSession("model-onnx/model.onnx")
    [prediction] = session.run(None, {
        "sample": numpy.zeros((2, 4, 64, 64), "float32"),
        "timestep": numpy.array([500], "float32"),
        "encoder_hidden_states": numpy.zeros((2, 77, 768), "float32"),
    })
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.quiet import quiet_exporter

ATOL: Final = 1e-4  # the most that any number of a prediction may differ from torch's, in fp32
FILE_NAME: Final = "model.onnx"
PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
_FATAL: Final = 4  # ONNX Runtime's own level of messages: what goes wrong is told by its exceptions
_OUTPUT: Final = "out_sample"


@dataclass(frozen=True, slots=True)
class _Case:
    """Sizes to run a UNet at: height and width in the smallest latents that it takes; no two sizes are alike, since
    torch would take them for one."""

    batch: int
    height: int
    width: int
    tokens: int
    timestep: float


_TRACED: Final = _Case(2, 4, 6, 7, 421.0)
_CASES: Final = (_TRACED, _Case(3, 2, 5, 77, 981.0), _Case(1, 3, 2, 9, 37.0))


def check_onnx() -> None:
    """Raise AsdmError, with the command that installs them, where packages of the `onnx` extra are missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise AsdmError(
            f"ONNX files need packages that are not installed: {', '.join(missing)}",
            "Install them with `pip install 'asdm-compress[onnx]'`.",
            ExitCode.ENVIRONMENT,
        )


def write_onnx(unet: UNet2DConditionModel, folder: Path) -> float:
    """Write a UNet in fp32 as `model.onnx` and `config.json`; the largest difference from torch that was seen.

    Weights of more than 1.5 GiB lie in `model.onnx.data` beside it: one ONNX file takes 2 GiB. A latent's sizes are
    multiples of the UNet's smallest, 2 ^ (levels - 1). Raises AsdmError where ONNX Runtime refuses the file, or differs
    by more than `ATOL` at any of several sizes and timesteps.
    """
    path = folder / FILE_NAME
    traced = _inputs(unet, _TRACED)
    free = torch.export.Dim.AUTO
    with torch.no_grad(), quiet_exporter():
        program = torch.export.export(
            unet,
            (),
            {**traced, "return_dict": False},
            dynamic_shapes={
                "sample": {0: free, 2: free, 3: free},
                "timestep": None,
                "encoder_hidden_states": {0: free, 1: free},
                "return_dict": None,
            },
            strict=False,
        )
        written = torch.onnx.export(program, verbose=False, input_names=list(traced), output_names=[_OUTPUT])
        assert written is not None
        _name_sizes(written)
        written.save(path)
    del program, written  # a whole UNet each
    unet.to_json_file(folder / "config.json")
    return compare_with_torch(unet, path)


def _name_sizes(program: Any) -> None:
    """Give the free sizes names that people read."""
    names = {"sample": {0: "batch", 2: "height", 3: "width"}, "encoder_hidden_states": {0: "batch", 1: "tokens"}}
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        for axis, name in names.get("sample" if value.name == _OUTPUT else value.name, {}).items():
            if not isinstance(value.shape[axis], int):
                value.shape[axis] = name


def compare_with_torch(unet: UNet2DConditionModel, path: Path) -> float:
    """The largest difference between a UNet's predictions and those of its file in ONNX Runtime, at several sizes.

    Raises AsdmError where that is more than `ATOL`, or the file does not run.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _FATAL
    largest = 0.0
    try:
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        for case in _CASES:
            inputs = _inputs(unet, case)
            found = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
            with torch.no_grad():
                wanted = unet(**inputs, return_dict=False)[0]
            # What is no number differs from everything.
            largest = max(largest, float((found - wanted).abs().nan_to_num(float("inf")).max()))
    except Exception as error:
        # ONNX Runtime's errors have no common class of their own.
        raise AsdmError(
            f"ONNX Runtime does not run the exported UNet: {str(error).splitlines()[0][:200]}", _hint(),
            ExitCode.ENVIRONMENT,
        ) from error  # fmt: skip
    if largest > ATOL:
        raise AsdmError(
            f"the exported UNet differs from torch's by {largest:.2g} in ONNX Runtime, more than {ATOL:g}", _hint(),
            ExitCode.ENVIRONMENT,
        )  # fmt: skip
    return largest


def _hint() -> str:
    return f"Nothing was written. Try other versions of torch, {', '.join(PACKAGES)}."


def _inputs(unet: UNet2DConditionModel, case: _Case) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(case.batch)
    smallest = 2 ** (len(unet.down_blocks) - 1)
    size = (case.batch, unet.config["in_channels"], smallest * case.height, smallest * case.width)
    return {
        "sample": torch.randn(size, generator=generator),
        "timestep": torch.tensor([case.timestep]),
        "encoder_hidden_states": torch.randn(
            case.batch, case.tokens, unet.config["cross_attention_dim"], generator=generator
        ),
    }
