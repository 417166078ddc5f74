"""Fitted corrections on disk: one safetensors file with the tensors `STEP/FEATURE/weight` and `STEP/FEATURE/bias`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import OUT_HINT, output_file
from asdm_compress.inheritance.corrections import Correction, CorrectionKey

_ALONG: Final = "fitted_along"


def save_corrections(
    corrections: Mapping[CorrectionKey, Correction], path: Path, hint: str = OUT_HINT, fitted_along: str = ""
) -> None:
    """Write all corrections of a schedule into one file; `hint` is what helps where the disk does not take it.

    `fitted_along` tells the schedule that they were fitted along from any other.
    """
    tensors: dict[str, Tensor] = {}
    for (step, feature), correction in corrections.items():
        tensors[f"{step}/{feature}/weight"] = correction.weight.detach().cpu().contiguous()
        tensors[f"{step}/{feature}/bias"] = correction.bias.detach().cpu().contiguous()
    with output_file(path, hint) as aside:
        save_file(tensors, aside, {_ALONG: fitted_along} if fitted_along else None)


def fitted_along(path: Path) -> str:
    """What the schedule is told by that a file's corrections were fitted along; nothing where it does not say."""
    with safe_open(path, framework="pt") as file:
        return str((file.metadata() or {}).get(_ALONG, ""))


def load_corrections(path: Path) -> dict[CorrectionKey, Correction]:
    """Read them; raises AsdmError where the file is not there, is damaged, or holds something else."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AsdmError(f"{path} cannot be read as a schedule's corrections: {error}") from error
    found: dict[CorrectionKey, Correction] = {}
    for name, weight in tensors.items():
        step, _, rest = name.partition("/")
        feature, _, part = rest.rpartition("/")
        bias = tensors.get(f"{step}/{feature}/bias")
        if not step.isdigit() or part not in ("weight", "bias") or bias is None:
            raise AsdmError(f"{path}: {name!r} is no part of a correction")
        if part == "weight":
            if weight.ndim != 2 or bias.shape != weight.shape[:1]:
                raise AsdmError(f"{path}: {name!r} and its bias do not fit together")
            found[int(step), feature] = Correction(weight, bias)
    return found
