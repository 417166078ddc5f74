"""Weights of measuring networks as users give them: read without running code, checked by names and shapes."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.files import cache_folder

_BLOCK: Final = 1 << 20
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pth", ".pt")


def weights_place(name: str) -> Path:
    """Where a weights file or folder is looked for that no option names."""
    return cache_folder() / "weights" / name


def find_weights(given: Path | None, name: str, what: str, option: str) -> Path:
    """The file or folder given, else the one at its usual place; raises AsdmError that says which to put where."""
    if given is not None:
        if not given.exists():
            raise AsdmError(f"{what} is not at {given}", f"Put {name} there, or name its place with {option}.")
        return given
    place = weights_place(name)
    if not place.exists():
        raise AsdmError(
            f"{what} is missing", f"Put {name} at {place}, or name its place with {option}.", ExitCode.ENVIRONMENT
        )
    return place


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .bin file; raises AsdmError for one that is not that, or holds code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AsdmError(f"{path} cannot be read as weights: {reason}", "Fetch the file again.") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AsdmError(f"{path} holds no plain set of named tensors", "Give a state dict.")
    return dict(state)


def check_shapes(
    path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, file_name: str
) -> None:
    """Raise AsdmError where a file's tensors are not those that a network has."""
    # Counters of batch norms say nothing about a network at rest, and old files go without them.
    names = {name for name in wanted if not name.endswith("num_batches_tracked")}
    missing = sorted(names - set(state))
    wrong = sorted(n for n in names & set(state) if state[n].shape != wanted[n].shape)
    foreign = sorted(set(state) - set(wanted))
    if missing or wrong or foreign:
        name = (missing or wrong or foreign)[0]
        how = "lacks" if missing else ("has another shape of" if wrong else "also has")
        raise AsdmError(f"{path} is not {what}: it {how} {name}", f"Give {file_name}.")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, or of a folder's configurations and weights with their names."""
    digest = hashlib.sha256()
    if path.is_file():
        _feed(digest, path)
        return digest.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".json", ".txt", *WEIGHT_SUFFIXES)):
        digest.update(file.relative_to(path).as_posix().encode())
        _feed(digest, file)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
