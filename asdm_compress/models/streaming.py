"""Tensors read and written one at a time, so that a checkpoint need not fit into memory."""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.files import check_safetensors, read_pickle, weight_files
from asdm_compress.models.recognise import check_numbers

_NAMES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
_SMALL_FLOATS: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS: Final = "diffusion_pytorch_model"
_ALIGNED: Final = 8  # the header's length is a multiple of this


@contextmanager
def reading(place: Path, allow_pickle: bool = False) -> Iterator[TensorReader]:
    """The tensors of a file, or of a diffusers folder's weights, each read when it is asked for.

    Floats of 8 bits, which torch stores and does not compute with, are read as fp16, which has all their values.
    Pickles are read whole. Raises AsdmError for files that are damaged, and for a folder without weights.
    """
    files = [place] if place.is_file() else weight_files(place)
    with ExitStack() as stack:
        found: dict[str, Callable[[], Tensor]] = {}
        dtypes: dict[str, torch.dtype] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            if path.suffix == ".safetensors":
                check_safetensors(path)
                file = stack.enter_context(safe_open(path, framework="pt"))
                for key in file.keys():  # noqa: SIM118 - an open file is no mapping
                    part = file.get_slice(key)
                    stored, shapes[key] = _dtype_of(path, part.get_dtype()), tuple(part.get_shape())
                    found[key], dtypes[key] = partial(file.get_tensor, key), stored
                    if stored in _SMALL_FLOATS:
                        found[key], dtypes[key] = partial(_widened, found[key]), torch.float16
            else:
                weights = read_pickle(path, allow_pickle)
                for key, value in weights.items():
                    found[key] = partial(weights.__getitem__, key)
                    dtypes[key], shapes[key] = value.dtype, tuple(value.shape)
        yield TensorReader(place, found, dtypes, shapes)


def _widened(get: Callable[[], Tensor]) -> Tensor:
    return get().to(torch.float16)


def _dtype_of(path: Path, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise AsdmError(f"{path} holds numbers of the kind {name}", f"Known kinds: {', '.join(_DTYPES)}.")
    return _DTYPES[name]


@dataclass(frozen=True, slots=True)
class TensorReader:
    """Tensors by name, read when asked for."""

    place: Path
    getters: Mapping[str, Callable[[], Tensor]]
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]

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
    """Write a safetensors file one tensor at a time, with the next one read meanwhile.

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
        with closing(_one_ahead(entries)) as read:
            for entry, tensor in read:
                if tuple(tensor.shape) != entry.shape:
                    raise AsdmError(f"{entry.name} has the shape {tuple(tensor.shape)}, and should have {entry.shape}")
                raw = tensor.to(entry.dtype).contiguous().reshape(-1).view(torch.uint8)
                file.write(raw.numpy().data)


def _one_ahead(entries: Sequence[Entry]) -> Generator[tuple[Entry, Tensor]]:
    """Every entry with its tensor, each of which is read, and looked at, while the one before it is written."""
    coming: deque[tuple[Entry, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as reader:
        for entry in entries:
            coming.append((entry, reader.submit(entry.get)))
            if len(coming) > 1:
                before, tensor = coming.popleft()
                yield before, tensor.result()
        for last, tensor in coming:
            yield last, tensor.result()


def write_sharded(
    folder: Path, entries: Sequence[Entry], most_bytes: int, variant: str | None = None, stem: str = WEIGHTS
) -> list[Path]:
    """Write entries as diffusers does: one file, or several of at most `most_bytes` with an index beside them.

    A `variant` is a part of every name, `stem` what they begin with; transformers' do with another.
    """
    blank = {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries}
    mark = f".{variant}" if variant else ""
    pattern = f"{stem}{mark}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(blank, filename_pattern=pattern, max_shard_size=most_bytes)
    by_name = {entry.name: entry for entry in entries}
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, [by_name[name] for name in names])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        place = folder / f"{stem}.safetensors.index{mark}.json"
        place.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / file for file in split.filename_to_tensors]
