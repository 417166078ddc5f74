"""Weight files: headers, pickles, and which of them a folder holds; a damaged or unsafe one is named."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.recognise import ONLY, what_is

AGAIN: Final = "Fetch or copy the file again."
# As diffusers and transformers name them, with a variant, and with a shard's number.
_WEIGHTS: Final = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.(?P<suffix>safetensors|bin)$"
)
_INDEX: Final = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)\.(?:safetensors|bin)\.index(?:\.\w+)?\.json$"
)
# The original checkpoints name a class of their training program, as a key beside the weights. In its place stands one
# of that name that does nothing.
_INERT: Final[list[Any]] = [type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})]
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for a message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def check_safetensors(path: Path) -> None:
    """Read the header, which also tells the length that the file must have."""
    try:
        if path.stat().st_size == 0:
            raise AsdmError(f"{path} is empty", AGAIN)
        with safe_open(path, framework="pt"):
            pass
    except OSError as error:
        raise AsdmError(f"{path} cannot be read: {error.strerror or first_line(error)}", AGAIN) from error
    except SafetensorError as error:
        raise AsdmError(f"{path} is truncated or no safetensors file: {first_line(error)}", AGAIN) from error


def check_folder(folder: Path, allow_pickle: bool) -> None:
    """Check the weights that are read of a part's folder, or of every part of a pipeline's.

    What else lies there, such as checkpoints of a training and other programs' weights, is nothing of the model's.
    """
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for name in choose_weights(path.name for path in place.iterdir())[0]:
            path = place / name
            check_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, allow_pickle)


def is_weights(name: str) -> bool:
    """Whether diffusers would open a file of this name as a part's weights, or as the index of their shards."""
    return bool(_WEIGHTS.match(name) or _INDEX.match(name))


def choose_weights(names: Iterable[str]) -> tuple[list[str], str | None]:
    """Of the files of one folder, the weights that are read, all of one variant, and that variant's name.

    Safetensors go before pickles, and weights without a variant (fp16, non_ema) before those with one.
    """
    found: dict[tuple[bool, bool, bool, str], list[str]] = {}
    for name in sorted(names):
        match = _WEIGHTS.match(name)
        if match:
            variant = match["variant"]
            rank = (match["suffix"] != "safetensors", variant is not None, variant != "fp16", variant or "")
            found.setdefault(rank, []).append(name)
    if not found:
        return [], None
    best = min(found)
    return found[best], best[-1] or None


def weight_files(folder: Path) -> list[Path]:
    """The weights of a diffusers folder, all of one variant; raises AsdmError where there are none."""
    names, _ = choose_weights(path.name for path in folder.iterdir())
    if not names:
        raise AsdmError(f"{folder} holds no weights", AGAIN)
    return [folder / name for name in names]


def variant_of(folder: Path) -> str | None:
    """`fp16`, or another variant, where a diffusers folder has its weights only in files of that variant."""
    return choose_weights(path.name for path in folder.iterdir())[1] if folder.is_dir() else None


def stored_dtype(folder: Path, allow_pickle: bool = False) -> torch.dtype:
    """The precision of a folder's weights, of the first that are no counts; raises AsdmError where there are none."""
    path = weight_files(folder)[0]
    if path.suffix == ".bin":
        kept = (tensor.dtype for tensor in read_pickle(path, allow_pickle).values())
        return next((dtype for dtype in kept if dtype.is_floating_point), torch.float32)
    with safe_open(path, framework="pt") as file:
        names = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
        return next((_DTYPES[name] for name in names if name in _DTYPES), torch.float32)


def read_pickle(path: Path, allow_pickle: bool) -> Mapping[str, Tensor]:
    """The tensors of a `.ckpt` or `.bin` file.

    Only tensors and plain containers are read. A file that holds anything else would run code, and is refused with
    AsdmError unless `allow_pickle` is set.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols
            # Mapped: tensors that nobody asks for, such as a second set of averaged weights, take no memory.
            with torch.serialization.safe_globals(_INERT):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise AsdmError(f"{path} is truncated or no checkpoint", AGAIN) from error
        if not allow_pickle:
            raise AsdmError(
                f"{path} is a pickle that would run code while it is read, and is refused",
                "Ask for a safetensors file; if you trust the file's author, add --allow-pickle.",
            ) from error
        loaded = _read_trusted(path)
    except OSError as error:
        raise AsdmError(f"{path} cannot be read: {error.strerror or first_line(error)}", AGAIN) from error
    except (EOFError, RuntimeError, ValueError, KeyError, IndexError) as error:
        said = first_line(error).partition(". ")[0]
        raise AsdmError(f"{path} is truncated or no checkpoint: {said}", AGAIN) from error
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    weights = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not weights:
        kind = what_is([key for key in inner if isinstance(key, str)])
        raise AsdmError(f"{path} is {kind}" if kind else f"{path} holds no weights", ONLY)
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
