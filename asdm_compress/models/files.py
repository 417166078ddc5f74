"""Weight files: headers, pickles, and which of them a folder holds; a damaged or unsafe one is named."""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asdm_compress.core.errors import AsdmError

AGAIN: Final = "Fetch or copy the file again."
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for a message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def check_safetensors(path: Path) -> None:
    """Read the header, which also tells the length that the file must have."""
    if path.stat().st_size == 0:
        raise AsdmError(f"{path} is empty", AGAIN)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise AsdmError(f"{path} is truncated or no safetensors file: {first_line(error)}", AGAIN) from error


def check_folder(folder: Path, allow_pickle: bool) -> None:
    """Check every weight file below `folder`; pickles are read only where they are the only weights of their folder."""
    for path in sorted(folder.rglob("*.safetensors")):
        check_safetensors(path)
    safe = {path.parent for path in folder.rglob("*.safetensors")}
    for path in sorted(folder.rglob("*.bin")):
        if path.parent not in safe:
            read_pickle(path, allow_pickle)


def variant_of(folder: Path) -> str | None:
    """`fp16` where a diffusers folder has its weights only in files of that variant."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision of the weights in a folder's safetensors files; fp32 where there are none."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - an open file is no mapping
                return _DTYPES.get(file.get_slice(key).get_dtype(), torch.float32)
    return torch.float32


def read_pickle(path: Path, allow_pickle: bool) -> Mapping[str, Tensor]:
    """The tensors of a `.ckpt` or `.bin` file.

    Only tensors and plain containers are read. A file that holds anything else would run code, and is refused with
    AsdmError unless `allow_pickle` is set.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise AsdmError(f"{path} is truncated or no checkpoint: {first_line(error)}", AGAIN) from error
        if not allow_pickle:
            raise AsdmError(
                f"{path} is a pickle that would run code while it is read, and is refused",
                "Ask for a safetensors file; if you trust the file's author, add --allow-pickle.",
            ) from error
        loaded = _read_trusted(path)
    except (EOFError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise AsdmError(f"{path} is truncated or no checkpoint: {first_line(error)}", AGAIN) from error
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    weights = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not weights:
        raise AsdmError(f"{path} holds no weights")
    return weights


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or torch's archive of one, without running any of it."""
    if zipfile.is_zipfile(path):
        return True
    try:
        with path.open("rb") as file:
            return any(operation.name == "STOP" for operation, _, _ in pickletools.genops(file))
    except (ValueError, IndexError, EOFError, UnicodeDecodeError):
        return False


def _read_trusted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        # Code of the file's own choice has run: any error can come out of it.
        raise AsdmError(f"{path} cannot be read, not even as a trusted pickle: {first_line(error)}") from error
