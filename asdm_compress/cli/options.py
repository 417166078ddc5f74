"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from asdm_compress.core.errors import AsdmError, ExitCode

if TYPE_CHECKING:
    import torch

    from asdm_compress.models.source import LoadOptions

Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]",
        help="mini-sd (bundled), sd15, sd21-base, sd21, a diffusers folder, a .safetensors or .ckpt file, or a hub id, "
        "which is fetched where the local cache does not have it.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto is fp32 on a CPU and fp16 on a GPU.")]
MeasureDtype = Annotated[
    str,
    typer.Option(
        help="Precision that errors are measured and fits are made in; times are those of --dtype. auto is fp32 on a "
        "GPU, and --dtype on a CPU, where fp32 takes longer. Half precision rounds away the damages of light cuts."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default as many as torch takes.")]
PredictionType = Annotated[
    str | None,
    typer.Option(help="epsilon or v_prediction: what the UNet of a single file predicts, where the file does not say."),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickle files that can run code. Only for files you trust.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 switches guidance off.")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first image.")]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="ddim, dpm++, dpm++-karras, euler, euler-a, lms, unipc, …; by default the model's own. One that calls the "
        "UNet more than once per step, as SD 1.x's PNDM, cannot be measured with: assemble, apply and frontier take "
        "dpm++ for it, calibrate and optimize ask for another."
    ),
]
ImageSize = Annotated[int | None, typer.Option(min=8, max=16_384, help="Pixels per side, by default the model's own.")]
Prompts = Annotated[Path | None, typer.Option(help="UTF-8 file with one prompt per line.")]


def refuse_given(context: typer.Context, names: Iterable[str], why: str, hint: str) -> None:
    """Raise AsdmError where one of these options is on the command line, which would do nothing there."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise AsdmError(f"--{name.replace('_', '-')} {why}", hint)


_TORCHS_OWN: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def own_name(dtype: str) -> str:
    """A precision by the name that it has here, of torch's names too."""
    return _TORCHS_OWN.get(dtype, dtype)


def command_line() -> str:
    """The command under way, as it can be typed again."""
    return shlex.join(["asdm-compress", *sys.argv[1:]])


def measure_dtype(name: str) -> torch.dtype | None:
    """The precision that a user names; None for auto. Raises AsdmError for one that there is not."""
    return None if own_name(name) == "auto" else _type_called(name)


def _type_called(name: str) -> torch.dtype:
    import torch

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if own_name(name) not in types:
        raise AsdmError(f"unknown dtype {name!r}", f"Use auto, {', '.join(types)}.")
    return types[own_name(name)]


def load_options(
    device: str,
    dtype: str,
    threads: int | None,
    allow_pickle: bool = False,
    random_weights: bool = False,
    prediction_type: str | None = None,
) -> LoadOptions:
    """Check the machine's part of the options; raises AsdmError for a device or dtype that is not there."""
    import torch

    from asdm_compress.models.prediction import parse_prediction_type
    from asdm_compress.models.source import LoadOptions

    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise AsdmError(f"unknown device {device!r}", "Use cpu, cuda or cuda:1.") from error
    if place.type not in ("cpu", "cuda"):
        raise AsdmError(f"the device {device} is not supported", "Use cpu, or cuda where there is a GPU.")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "cuda" and (place.index or 0) >= cards:
        raise AsdmError(
            f"the device {device} is not available here", "See `asdm-compress doctor`.", ExitCode.ENVIRONMENT
        )
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    if own_name(dtype) == "auto":
        dtype = "fp32" if place.type == "cpu" else "fp16"
    return LoadOptions(_type_called(dtype), place, random_weights, allow_pickle, parse_prediction_type(prediction_type))
