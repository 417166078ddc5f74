"""Tensors read and written one at a time, so that a checkpoint need not fit into memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.files import check_safetensors, read_pickle, variant_of
from asdm_compress.models.recognise import check_numbers

_NAMES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
PATTERN: Final = "diffusion_pytorch_model{suffix}.safetensors"
_ALIGNED: Final = 8  # the header's length is a multiple of this


@contextmanager
def reading(place: Path, allow_pickle: bool = False) -> Iterator[TensorReader]:
    """The tensors of a file, or of a diffusers folder's weights, each read when it is asked for.

    Pickles are read whole. Raises AsdmError for files that are damaged, and for a folder without weights.
    """
    files = [place] if place.is_file() else _files_of(place)
    with ExitStack() as stack:
        found: dict[str, Callable[[], Tensor]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in files:
            if path.suffix == ".safetensors":
                check_safetensors(path)
                file = stack.enter_context(safe_open(path, framework="pt"))
                for key in file.keys():  # noqa: SIM118 - an open file is no mapping
                    found[key] = partial(file.get_tensor, key)
                    dtypes[key] = _DTYPES[file.get_slice(key).get_dtype()]
            else:
                weights = read_pickle(path, allow_pickle)
                for key, value in weights.items():
                    found[key], dtypes[key] = partial(weights.__getitem__, key), value.dtype
        yield TensorReader(place, found, dtypes)


def _files_of(folder: Path) -> list[Path]:
    """A folder's weight files: of one variant, and safetensors where there are any."""
    variant = variant_of(folder)
    safe = sorted(p for p in folder.glob("*.safetensors") if (variant is not None) == (".fp16" in p.name))
    found = safe or sorted(folder.glob("*.bin"))
    if not found:
        raise AsdmError(f"{folder} holds no weights", "Fetch or copy the folder again.")
    return found


@dataclass(frozen=True, slots=True)
class TensorReader:
    """Tensors by name, read when asked for."""

    place: Path
    getters: Mapping[str, Callable[[], Tensor]]
    dtypes: Mapping[str, torch.dtype]

    def __contains__(self, name: str) -> bool:
        return name in self.getters

    def names(self) -> list[str]:
        """All names."""
        return list(self.getters)

    def get(self, name: str) -> Tensor:
        """One tensor; raises AsdmError where it is missing or holds what is no number."""
        if name not in self.getters:
            raise AsdmError(f"{name} is missing in {self.place}", "The files are damaged, or of another model.")
        tensor = self.getters[name]()
        check_numbers(self.place, {name: tensor})
        return tensor


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: what it will be, and how to get it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file one tensor at a time.

    The format: the header's length as 8 little-endian bytes, the header as JSON, then the tensors' bytes one after the
    other. Raises AsdmError for a tensor of another shape than announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        end = at + entry.bytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            tensor = entry.get()
            if tuple(tensor.shape) != entry.shape:
                raise AsdmError(f"{entry.name} has the shape {tuple(tensor.shape)}, and should have {entry.shape}")
            raw = tensor.to(entry.dtype).contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)


def write_sharded(folder: Path, entries: Sequence[Entry], most_bytes: int) -> list[Path]:
    """Write entries as diffusers does: one file, or several of at most `most_bytes` with an index beside them."""
    blank = {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries}
    split = split_torch_state_dict_into_shards(blank, filename_pattern=PATTERN, max_shard_size=most_bytes)
    by_name = {entry.name: entry for entry in entries}
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, [by_name[name] for name in names])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        place = folder / f"{PATTERN.format(suffix='')}.index.json"
        place.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / file for file in split.filename_to_tensors]
